"""POST /v1/chat/completions (OpenAI API reference, "Create chat completion")."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api.chat_turn import ChatTurn, begin_turn
from jaxserve.api.generation import Reply, end_fields, log_request, new_reply, with_errors
from jaxserve.api.http import DONE, event
from jaxserve.api.logprobs import chat_logprobs, prompt_logprobs_list
from jaxserve.api.route import Route
from jaxserve.api.schema import ChatRequest, parse_request
from jaxserve.api.serving import Serving
from jaxserve.text.generate import PromptLogprobs
from jaxserve.text.message import Message, MessageDelta, ToolCallDelta


async def create_chat_completion(serving: Serving, http: Request) -> Response:
    """Every error is raised before the first byte of the reply."""
    return await ROUTE.respond(serving, http)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run."""

    turn: ChatTurn
    reply: Reply

    @property
    def stream(self) -> bool:
        return bool(self.turn.request.stream)


async def _begin(serving: Serving, body: dict[str, Any], priority: int) -> Job:
    serving.require_ready()
    request = parse_request(ChatRequest, body, serving.fields)
    turn = await begin_turn(serving, request, priority)
    reply = new_reply(request, "chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion")
    log_request(serving, reply, request, turn.params, turn.num_prompt)
    return Job(turn, reply)


async def _whole(serving: Serving, job: Job) -> dict[str, Any]:
    turn, count = job.turn, job.turn.request.num_choices
    tokenizer, _ = serving.require_ready()
    messages = [Message() for _ in range(count)]
    logprobs: list[dict[str, Any] | None] = [None] * count
    stops: list[int | str | None] = [None] * count
    scores: PromptLogprobs | None = None
    try:
        async for index, delta in turn.messages:
            messages[index].add(delta)
            tokens = delta.tokens
            scores = scores or tokens.prompt_logprobs
            if tokens.logprobs is not None:
                part = chat_logprobs(tokenizer, tokens.token_ids, tokens.logprobs)
                whole = logprobs[index]
                if whole is None:
                    logprobs[index] = part
                else:
                    whole["content"] += part["content"]
            if delta.finish_reason is not None:
                stops[index] = tokens.matched_stop
    finally:
        await turn.messages.aclose()
    choices = [
        {
            "index": index,
            "message": _message(message),
            "logprobs": logprobs[index],
            **end_fields(tokenizer, _finish_reason(turn, message.finish_reason), stops[index]),
        }
        for index, message in enumerate(messages)
    ]
    tail = {"usage": turn.usage.as_dict(), "service_tier": None, "system_fingerprint": None}
    if scores is not None:
        tail["prompt_logprobs"] = prompt_logprobs_list(
            tokenizer, turn.prompt_ids, scores, turn.request.prompt_logprobs or 0
        )
    return {**job.reply.head(), "choices": choices, **tail}


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["content"] = message.content or None
        value["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return value


def _finish_reason(turn: ChatTurn, reason: str | None) -> str | None:
    """As OpenAI's: a call that tool_choice named ends with "stop"."""
    return "stop" if reason == "tool_calls" and turn.tools.named else reason


def _call_delta(part: ToolCallDelta) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _events(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    return with_errors(_chunks(serving, job))


async def _chunks(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    """Role chunk per index, content chunks, one finish chunk per index, usage if asked for, [DONE]."""
    turn, reply = job.turn, job.reply
    request, usage = turn.request, turn.usage
    tokenizer, _ = serving.require_ready()
    opened: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, end: MessageDelta | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, "matched_stop": None}
        if end is not None:
            choice |= end_fields(tokenizer, _finish_reason(turn, end.finish_reason), end.tokens.matched_stop)
        value = {**reply.head(), "choices": [choice]}
        if request.include_usage:
            value["usage"] = usage.as_dict() if request.usage_in_every_chunk else None
        return event(value)

    try:
        async for index, delta in turn.messages:
            parts, tokens = [], delta.tokens
            if index not in opened:
                opened.add(index)
                parts.append(chunk(index, {"role": "assistant", "content": ""}))
            logprobs = None if not tokens.logprobs else chat_logprobs(tokenizer, tokens.token_ids, tokens.logprobs)
            if delta.reasoning:
                parts.append(chunk(index, {"reasoning_content": delta.reasoning}))
            if delta.content or logprobs is not None:
                parts.append(chunk(index, {"content": delta.content}, logprobs))
            parts += [chunk(index, {"tool_calls": [_call_delta(part)]}) for part in delta.tool_calls]
            if delta.finish_reason is not None:
                parts.append(chunk(index, {}, end=delta))
            if parts:
                yield b"".join(parts)
        if request.include_usage:
            yield event({**reply.head(), "choices": [], "usage": usage.as_dict()})
        yield DONE
    finally:
        await turn.messages.aclose()


ROUTE: Route[Job] = Route(_begin, _whole, _events)
