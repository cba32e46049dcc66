"""What a request says about the form of its answer -> the grammar that the engine is given."""

import asyncio

from pydantic import BaseModel

from jaxserve.api.serving import Serving
from jaxserve.text.grammar import FIELDS, grammar_of


async def request_grammar(serving: Serving, request: BaseModel) -> str | None:
    """request: of any route -> None where it asks for nothing. Raises ParameterError (400), which names the field and
    the problem.

    Off the event loop: a large schema takes 0.1 s to check.
    """
    fields = {name: value for name in FIELDS if (value := getattr(request, name, None)) is not None}
    return await asyncio.to_thread(grammar_of, fields, serving.grammar_checker) if fields else None
