"""POST /v1/chat/completions (OpenAI API reference, "Create chat completion")."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api.errors import invalid_request
from jaxserve.api.generation import (
    Deltas,
    Reply,
    Usage,
    at_least,
    deltas_of,
    encode,
    generate_options,
    log_request,
    new_reply,
    resolve,
    sampling_request,
    with_errors,
)
from jaxserve.api.http import DONE, begin_stream, event, json_response, read_json, unless_disconnected
from jaxserve.api.logprobs import chat_logprobs
from jaxserve.api.messages import plain_messages
from jaxserve.api.schema import ChatRequest, parse_request
from jaxserve.api.serving import Serving
from jaxserve.text.chat_template import TemplateError
from jaxserve.text.generate import Delta


async def create_chat_completion(serving: Serving, http: Request) -> Response:
    """Every error is raised before the first byte of the reply."""
    body = await read_json(http, serving.config.max_body_size)
    job = await _begin(serving, body)
    if job.request.stream:
        job = replace(job, deltas=at_least(job.deltas, serving.config.stream_interval))
        return await begin_stream(http, with_errors(_events(serving, job)))
    return json_response(await unless_disconnected(http, _whole(serving, job)))


async def answer(serving: Serving, body: dict[str, Any], priority: int = 0) -> dict[str, Any]:
    """The whole reply to a request that does not stream, for callers without an HTTP connection (batches).

    Raises APIError and what errors.as_api_error knows.
    """
    return await _whole(serving, await _begin(serving, body, priority))


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run."""

    request: ChatRequest
    reply: Reply
    usage: Usage
    deltas: Deltas


async def _begin(serving: Serving, body: dict[str, Any], priority: int = 0) -> Job:
    serving.require_ready()
    request = parse_request(ChatRequest, body, serving.fields)
    serving.check_model(request.model)
    num_logprobs = _num_logprobs(request)
    prompt = await encode(serving, render(serving, request), "messages", add_special_tokens=False)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    wanted = sampling_request(request, max_tokens, num_logprobs)
    params = resolve(serving, wanted, len(prompt), request.num_choices)
    options = generate_options(request, after_text=bool(request.continue_final_message), priority=priority)
    deltas = deltas_of(serving, [prompt], [params], options)
    usage = Usage(len(prompt), serving.config.enable_cache_report)
    reply = new_reply(request, "chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion")
    log_request(serving, reply, request, params, len(prompt))
    return Job(request, reply, usage, deltas)


def _num_logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise invalid_request("top_logprobs is only allowed together with logprobs: true.", "top_logprobs")
        return None
    return request.top_logprobs or 0


def render(serving: Serving, request: ChatRequest) -> str:
    """messages -> the prompt, through the model's chat template.

    Raises APIError 400 with the template's own message.
    """
    tokenizer, _ = serving.require_ready()
    messages = plain_messages(request.messages)
    proceed = bool(request.continue_final_message)
    if proceed and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise invalid_request(message, "continue_final_message")
    if proceed and messages[-1]["role"] != "assistant":
        message = "continue_final_message needs an assistant message at the end of messages."
        raise invalid_request(message, "continue_final_message")
    if tokenizer.chat_template is None:
        message = "This model has no chat template; start the server with --chat-template, or use /v1/completions."
        raise invalid_request(message, "messages", "no_chat_template")
    add = not proceed if request.add_generation_prompt is None else request.add_generation_prompt
    try:
        return tokenizer.chat_template.render(
            messages,
            add_generation_prompt=add,
            continue_final_message=proceed,
            kwargs=request.chat_template_kwargs,
        )
    except TemplateError as error:
        raise invalid_request(f"The chat template refused the messages: {error}", "messages") from None


async def _whole(serving: Serving, job: Job) -> dict[str, Any]:
    request, reply, deltas, usage = job.request, job.reply, job.deltas, job.usage
    texts: list[list[str]] = [[] for _ in range(request.num_choices)]
    logprobs: list[dict[str, Any] | None] = [None] * request.num_choices
    ends: list[Delta | None] = [None] * request.num_choices
    tokenizer, _ = serving.require_ready()
    try:
        async for index, delta in deltas:
            usage.add(0, index, delta, index == 0)
            texts[index].append(delta.text)
            if delta.logprobs is not None:
                part = chat_logprobs(tokenizer, delta.token_ids, delta.logprobs)
                whole = logprobs[index]
                if whole is None:
                    logprobs[index] = part
                else:
                    whole["content"] += part["content"]
            if delta.finish_reason is not None:
                ends[index] = delta
    finally:
        await deltas.aclose()
    choices = []
    for index, end in enumerate(ends):
        assert end is not None, "every choice ends with a finish reason"
        content = "".join(texts[index])
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": logprobs[index],
                "finish_reason": end.finish_reason,
                "matched_stop": end.matched_stop,
            }
        )
    tail = {"usage": usage.as_dict(), "service_tier": None, "system_fingerprint": None}
    return {**reply.head(), "choices": choices, **tail}


async def _events(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    """Role chunk per index, content chunks, one finish chunk per index, usage if asked for, [DONE]."""
    request, reply, deltas, usage = job.request, job.reply, job.deltas, job.usage
    tokenizer, _ = serving.require_ready()
    opened: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, end: Delta | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, "matched_stop": None}
        if end is not None:
            choice |= {"finish_reason": end.finish_reason, "matched_stop": end.matched_stop}
        value = {**reply.head(), "choices": [choice]}
        if request.include_usage:
            value["usage"] = usage.as_dict() if request.usage_in_every_chunk else None
        return event(value)

    try:
        async for index, delta in deltas:
            usage.add(0, index, delta, index == 0)
            parts = []
            if index not in opened:
                opened.add(index)
                parts.append(chunk(index, {"role": "assistant", "content": ""}))
            logprobs = None if not delta.logprobs else chat_logprobs(tokenizer, delta.token_ids, delta.logprobs)
            if delta.text or logprobs is not None:
                parts.append(chunk(index, {"content": delta.text}, logprobs))
            if delta.finish_reason is not None:
                parts.append(chunk(index, {}, end=delta))
            if parts:
                yield b"".join(parts)
        if request.include_usage:
            yield event({**reply.head(), "choices": [], "usage": usage.as_dict()})
        yield DONE
    finally:
        await deltas.aclose()
