"""What a request says about the form of its answer -> the grammar that the engine is given."""

import asyncio

from pydantic import BaseModel

from jaxserve.api.schema import ChatRequest
from jaxserve.api.serving import Serving
from jaxserve.api.tools import ToolUse
from jaxserve.text.dialect import Thinking
from jaxserve.text.grammar import FIELDS, GrammarChecker, grammar_of, json_schema
from jaxserve.text.params import ParameterError
from jaxserve.text.tool_grammar import Thinks, parameters_of, turn_grammar_of


async def request_grammar(serving: Serving, request: BaseModel) -> str | None:
    """request: of any route -> None where it asks for nothing. Raises ParameterError (400), which names the field and
    the problem.

    Off the event loop: a large schema takes 0.1 s to check.
    """
    fields = {name: value for name in FIELDS if (value := getattr(request, name, None)) is not None}
    return await asyncio.to_thread(grammar_of, fields, serving.grammar_checker) if fields else None


async def turn_grammar(serving: Serving, request: ChatRequest, tools: ToolUse, thinking: Thinking) -> str | None:
    """The grammar of a whole turn: calls where tool_choice wants them, else what the request says of the answer (or
    calls, where there are tools), and before either, thinking.

    Raises ParameterError (400).
    """
    answer = await request_grammar(serving, request)
    required = tools.mode == "required"
    checker = serving.grammar_checker
    if not required and answer is None:
        if tools.strict:
            await asyncio.to_thread(_check_schemas, tools, checker, only_strict=True)
        return None
    tokenizer, _ = serving.require_ready()
    dialect = serving.dialect()
    thinks: Thinks = "no"
    if dialect.thinks and thinking != "over":
        thinks = "inside" if thinking == "inside" or dialect.always_thinks else "maybe"
    if not tools.tools and thinks == "no":
        return answer

    def is_special(text: str) -> bool:
        return tokenizer.backend.token_to_id(text) in tokenizer.special_ids

    def build() -> str:
        grammar = turn_grammar_of(
            tools.tools,
            dialect.format.name if dialect.format else "",
            parallel=tools.parallel,
            is_special=is_special,
            answer=None if required else answer,
            thinks=thinks,
        )
        try:
            checker.check(grammar, "tools" if tools.tools else "response_format")
        except ParameterError:
            _check_schemas(tools, checker)
            raise
        return grammar

    return await asyncio.to_thread(build)


def _check_schemas(tools: ToolUse, checker: GrammarChecker, only_strict: bool = False) -> None:
    """Raises ParameterError naming the function at fault."""
    for index, tool in enumerate(tools.tools):
        if only_strict and index not in tools.strict:
            continue
        param = f"tools.[{index}].function.parameters"
        try:
            checker.check(json_schema(parameters_of(tool), param), param)
        except ParameterError as error:
            raise ParameterError(f"function {tool['function']['name']!r}: {error.message}", param) from None
