"""POST /v1/embeddings (OpenAI API reference, "Create embeddings"), and SGLang's /encode for the same vectors.

Every vector has length 1, as OpenAI's have. An encoder server and a chat server answer alike.
"""

import base64
import math
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from jaxserve.api import running
from jaxserve.api.completions import check_ids
from jaxserve.api.errors import invalid_request, unsupported
from jaxserve.api.generation import encode_all
from jaxserve.api.http import json_response, read_json, unless_disconnected
from jaxserve.api.route import Route
from jaxserve.api.schema import MAX_ID_LENGTH, Refused, TokenId, parse_fields
from jaxserve.api.serving import Serving
from jaxserve.client import EngineUnavailable
from jaxserve.text.embed import embed_all

MAX_INPUTS = 2048  # OpenAI's limit

Prompts = tuple[tuple[int, ...], ...]
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings. Types are strict."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool | None = None  # vLLM: texts get the model's own, unless this is false


class EncodeRequest(BaseModel):
    """POST /encode: one of text and input_ids."""

    model_config = ConfigDict(strict=True, extra="ignore")

    text: str | list[str] | None = None
    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    rid: Id | list[Id] | None = None


REFUSED_IN_EMBEDDINGS: dict[str, Refused] = {
    "messages": Refused("this route takes input; render messages to text first"),
    "prompt": Refused("the field is called input on this route"),
    "stream": Refused("vectors come whole", (False,)),
    "input_type": Refused("texts are embedded as they are; write the model's prefix into them"),
    "instruction": Refused("texts are embedded as they are; write the instruction into them", ("",)),
    "prompt_name": Refused("texts are embedded as they are; write the prompt into them"),
    "normalize": Refused("vectors always have length 1", (True,)),
    "truncate": Refused("inputs are never cut; send shorter ones", (False, "NONE")),
    "truncate_prompt_tokens": Refused("inputs are never cut; send shorter ones"),
    "embed_dtype": Refused("vectors are float32", ("float32",)),
    "endianness": Refused("base64 is of little-endian numbers", ("native", "little")),
    "lora_path": Refused("adapters are not supported yet", ("",)),
    "priority": Refused("priorities per request are not supported", (0,)),
}
REFUSED_IN_ENCODE: dict[str, Refused] = {
    "image_data": Refused("only text is embedded here", ([],)),
    "audio_data": Refused("only text is embedded here", ([],)),
    "input_embeds": Refused("only text and token ids are accepted"),
    "lora_path": Refused("adapters are not supported yet", ("",)),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run. prompts are token ids."""

    model: str
    prompts: Prompts
    dimensions: int | None  # None: all there are
    base64: bool
    priority: int
    stream: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts))


async def create_embeddings(serving: Serving, http: Request) -> Response:
    """A vector of each input, in their order. Every error is raised before the first byte of the reply."""
    return await ROUTE.respond(serving, http)


async def _begin(serving: Serving, body: dict[str, Any], priority: int) -> Job:
    serving.require_ready()
    request = parse_fields(EmbeddingRequest, body, REFUSED_IN_EMBEDDINGS, serving.fields)
    serving.check_model(request.model)
    dimensions = _dimensions(serving, request.dimensions)
    inputs: Any = request.input
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        inputs = [inputs]
    prompts = await _prompts(serving, inputs, "input", special=request.add_special_tokens is not False)
    _check_capacity(serving, len(prompts), priority)
    return Job(request.model, prompts, dimensions, request.encoding_format == "base64", priority)


def _dimensions(serving: Serving, given: int | None) -> int | None:
    """Raises APIError 400 where this server makes no vectors, or none of that size."""
    _, ready = serving.require_ready()
    size = ready.embedding_size
    if not size:
        raise unsupported("This model makes no embeddings.", "model")
    if given is None or given == size:
        return None
    allowed = serving.matryoshka
    if allowed is None:
        message = f"This model does not support other dimensions than its own {size}; leave 'dimensions' out."
        raise unsupported(message, "dimensions")
    if given > size or (allowed and given not in allowed):
        sizes = ", ".join(map(str, allowed)) if allowed else f"1 to {size}"
        raise invalid_request(f"dimensions is {given}; this model's vectors may have {sizes}.", "dimensions")
    return given


async def _prompts(serving: Serving, inputs: Sequence[Any], param: str, *, special: bool) -> Prompts:
    """Texts or rows of ids -> ids. Raises APIError 400 for none, too many, empty ones and ones that are too long."""
    _, ready = serving.require_ready()
    if not inputs or not all(inputs):
        raise invalid_request(f"'{param}' must not be empty, nor may any part of it.", param, "empty_input")
    if len(inputs) > MAX_INPUTS:
        message = f"'{param}' has {len(inputs)} entries; at most {MAX_INPUTS} are allowed in one request."
        raise invalid_request(message, param)
    if isinstance(inputs[0], str):
        rows = await encode_all(serving, inputs, param, add_special_tokens=special)
    else:
        rows = [check_ids(serving, row, param) for row in inputs]
    for index, row in enumerate(rows):
        if not row:
            raise invalid_request(f"Entry {index} of '{param}' has no tokens.", param, "empty_input")
        if len(row) > ready.max_model_len:
            message = (
                f"Entry {index} of '{param}' has {len(row)} tokens; this model's maximum context length is "
                f"{ready.max_model_len} tokens (--max-model-len); shorten or split it."
            )
            raise invalid_request(message, param, "context_length_exceeded")
    return tuple(tuple(row) for row in rows)


def _check_capacity(serving: Serving, count: int, priority: int) -> None:
    limit = serving.client.max_open_requests
    if priority <= 0 and limit is not None and count > limit:
        raise invalid_request(f"{count} inputs are more than this server takes at once ({limit}).", "input")


async def _vectors(serving: Serving, job: Job) -> list["array[float]"]:
    """[inputs] arrays of float32, cut to the dimensions that were asked for."""
    if job.priority > 0:  # its time is not measured, since it waits on purpose
        found = await embed_all(serving.client, job.prompts, job.priority)
    else:
        with serving.metrics.measure_vectors(len(job.prompts)):
            found = await _embed_for_caller(serving, job)
    vectors = [array("f", vector) for vector in found]
    return vectors if job.dimensions is None else [_cut(vector, job.dimensions) for vector in vectors]


async def _embed_for_caller(serving: Serving, job: Job) -> list[bytes]:
    caller = running.current()
    try:
        return await embed_all(serving.client, job.prompts, owner=caller)
    except EngineUnavailable:
        if caller is not None and caller.ended:
            raise invalid_request("The request was ended by /abort_request.", code="request_aborted") from None
        raise


def _cut(vector: "array[float]", size: int) -> "array[float]":
    """The first numbers, of length 1 again (Kusupati et al. 2022, Matryoshka representations)."""
    kept = vector[:size]
    length = math.sqrt(sum(value * value for value in kept)) or 1.0
    return array("f", (value / length for value in kept))


async def _whole(serving: Serving, job: Job) -> dict[str, Any]:
    vectors = await _vectors(serving, job)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, job.base64)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": job.num_tokens, "total_tokens": job.num_tokens}
    return {"object": "list", "data": data, "model": job.model, "usage": usage}


def _written(vector: "array[float]", as_base64: bool) -> str | list[float]:
    return base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()


ROUTE: Route[Job] = Route(_begin, _whole)


async def encode(serving: Serving, http: Request) -> Response:
    """{text} or {input_ids} -> {embedding, meta_info}; a list of them for a list."""
    body = await read_json(http, serving.config.max_body_size)
    serving.require_ready()
    request = parse_fields(EncodeRequest, body, REFUSED_IN_ENCODE, serving.fields)
    dimensions = _dimensions(serving, request.dimensions)
    if (request.text is None) == (request.input_ids is None):
        raise invalid_request("Give one of 'text' and 'input_ids'.", "text")
    param = "input_ids" if request.text is None else "text"
    inputs: Any = request.input_ids if request.text is None else request.text
    one = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
    prompts = await _prompts(serving, [inputs] if one else inputs, param, special=True)
    _check_capacity(serving, len(prompts), 0)
    ids = _request_ids(request.rid, len(prompts))
    running.also_known_as(*ids)
    job = Job("", prompts, dimensions, base64=False, priority=0)
    vectors = await unless_disconnected(http, _vectors(serving, job))
    rows = [
        {
            "embedding": vector.tolist(),
            "meta_info": {"id": ids[index], "finish_reason": {"type": "stop"}, "prompt_tokens": len(prompts[index])},
        }
        for index, vector in enumerate(vectors)
    ]
    return json_response(rows[0] if one else rows)


def _request_ids(rid: str | list[str] | None, count: int) -> list[str]:
    given = [rid] if isinstance(rid, str) else rid or [secrets.token_hex(16) for _ in range(count)]
    if len(given) != count:
        raise invalid_request(f"'rid' has {len(given)} ids for {count} inputs.", "rid")
    return given
