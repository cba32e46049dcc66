"""Routes about the server itself: health, models, configuration, tokens, the prefix cache.

SGLang's and vLLM's names.
"""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from jaxserve.api.chat_turn import render
from jaxserve.api.completions import check_ids
from jaxserve.api.errors import invalid_request, unavailable
from jaxserve.api.generation import encode, encode_all, resolve
from jaxserve.api.http import json_response, read_json, unless_disconnected
from jaxserve.api.metrics import CONTENT_TYPE
from jaxserve.api.schema import ChatRequest, TokenId, parse_request
from jaxserve.api.serving import Serving, model_not_found
from jaxserve.text.embed import embed
from jaxserve.text.generate import GenerateOptions, generate
from jaxserve.text.params import SamplingRequest
from jaxserve.version import __version__

PROBE_TIMEOUT = 20.0  # seconds that /health_generate waits for one token


SAMPLING_PARAMS = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password", "store")


async def health(serving: Serving, http: Request) -> Response:
    """200 when requests can be served, else 503 with {status, stage, done, total, message}."""
    stage = serving.stage()
    return json_response({"status": "ok"}) if stage is None else json_response(stage, 503)


async def ping(serving: Serving, http: Request) -> Response:
    """/health for load balancers that read only the status (vLLM's and SageMaker's name)."""
    return Response(status_code=200 if serving.stage() is None else 503)


async def health_generate(serving: Serving, http: Request) -> Response:
    """200 when the engine samples a token (or makes a vector) within PROBE_TIMEOUT, else 503."""
    tokenizer, _ = serving.require_ready()

    async def probe() -> None:
        async with asyncio.timeout(PROBE_TIMEOUT):
            if not serving.generates:
                await embed(serving.client, [0])
                return
            wanted = SamplingRequest(max_tokens=1, temperature=0.0, ignore_eos=True)
            params = resolve(serving, wanted, num_prompt=1, num_choices=1)
            async for _ in generate(serving.client, tokenizer, [0], params, GenerateOptions()):
                pass

    try:
        await unless_disconnected(http, probe())
    except TimeoutError:
        message = f"The engine gave no answer within {PROBE_TIMEOUT:g} seconds."
        raise unavailable(message, "engine_stalled") from None
    return json_response({"status": "ok"})


def _model_card(serving: Serving, name: str) -> dict[str, Any]:
    _, ready = serving.require_ready()
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "jaxserve",
        "root": serving.config.model_path,
        "parent": None,
        "max_model_len": ready.max_model_len,
    }


async def list_models(serving: Serving, http: Request) -> Response:
    """The names that are served."""
    serving.require_ready()
    return json_response({"object": "list", "data": [_model_card(serving, name) for name in serving.model_names]})


async def get_model(serving: Serving, http: Request) -> Response:
    """One of the names that are served."""
    serving.require_ready()
    name = http.path_params["model"]
    if name not in serving.model_names:
        raise model_not_found(name, serving.model_names)
    return json_response(_model_card(serving, name))


async def get_model_info(serving: Serving, http: Request) -> Response:
    """Path, names, context length, and the sampling parameters of a request that names none."""
    _, ready = serving.require_ready()
    config = serving.config
    return json_response(
        {
            "model_path": config.model_path,
            "tokenizer_path": config.tokenizer_path or config.model_path,
            "is_generation": serving.generates,
            "served_model_names": config.served_model_names,
            "max_model_len": ready.max_model_len,
            "default_sampling_params": _sampling_defaults(serving),
        }
    )


def _sampling_defaults(serving: Serving) -> dict[str, Any] | None:
    """None where no text is generated."""
    if not serving.generates:
        return None
    chosen = asdict(resolve(serving, SamplingRequest(), num_prompt=1, num_choices=1)[0])
    return {name: chosen[name] for name in SAMPLING_PARAMS}


async def get_server_info(serving: Serving, http: Request) -> Response:
    """Flags (without secrets), what the engine chose, and its latest counts."""
    _, ready = serving.require_ready()
    flags = {name: value for name, value in asdict(serving.config).items() if name not in SECRETS}
    stats = None if serving.client.stats is None else asdict(serving.client.stats)
    return json_response({"version": __version__, "server": flags, "engine": asdict(ready), "stats": stats})


async def version(serving: Serving, http: Request) -> Response:
    """This server's version."""
    return json_response({"version": __version__})


async def metrics(serving: Serving, http: Request) -> Response:
    """Counts and times in Prometheus' text format."""
    return Response(serving.metrics.render(), headers={"content-type": CONTENT_TYPE})


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: str | list[str]
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    tokens: list[TokenId] | list[Annotated[list[TokenId], Field()]]
    skip_special_tokens: bool = True


async def tokenize(serving: Serving, http: Request) -> Response:
    """{prompt} or {model, messages} -> {tokens, count, max_model_len}; lists of both for a list of prompts."""
    body = await read_json(http, serving.config.max_body_size)
    _, ready = serving.require_ready()
    if "messages" in body:
        body.setdefault("model", serving.model_names[0])
        text = await render(serving, parse_request(ChatRequest, body, serving.fields))
        tokens: list[Any] = await encode(serving, text, "messages", add_special_tokens=False)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": ready.max_model_len})
    try:
        request = TokenizeRequest.model_validate(body)
    except ValidationError:
        message = "'prompt' must be a string or an array of strings, and add_special_tokens a boolean."
        raise invalid_request(message, "prompt") from None
    special = request.add_special_tokens
    if isinstance(request.prompt, str):
        tokens = await encode(serving, request.prompt, "prompt", add_special_tokens=special)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": ready.max_model_len})
    rows = await encode_all(serving, request.prompt, "prompt", add_special_tokens=special)
    counts = [len(row) for row in rows]
    return json_response({"tokens": rows, "count": counts, "max_model_len": ready.max_model_len})


async def detokenize(serving: Serving, http: Request) -> Response:
    """{tokens} -> {text, prompt}: SGLang's and vLLM's names for the same string; a list of both for rows of tokens."""
    body = await read_json(http, serving.config.max_body_size)
    tokenizer, _ = serving.require_ready()
    try:
        request = DetokenizeRequest.model_validate(body)
    except ValidationError:
        message = "'tokens' must be an array of token ids or of such arrays, and skip_special_tokens a boolean."
        raise invalid_request(message, "tokens") from None
    skip = request.skip_special_tokens
    if request.tokens and isinstance(request.tokens[0], list):
        rows = [check_ids(serving, row, "tokens") for row in request.tokens]
        texts = [tokenizer.decode(row, skip_special_tokens=skip) for row in rows]
        return json_response({"text": texts, "prompt": texts})
    text = tokenizer.decode(check_ids(serving, request.tokens, "tokens"), skip_special_tokens=skip)
    return json_response({"text": text, "prompt": text})
