"""Anthropic's /v1/messages (Anthropic API reference, "Messages"), for clients that speak it."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api import running
from jaxserve.api.anthropic_events import Event, MessageBuilder
from jaxserve.api.anthropic_request import MessagesRequest, as_chat_request, in_our_words, parse_messages_request
from jaxserve.api.chat_turn import ChatTurn, begin_turn
from jaxserve.api.errors import APIError, anthropic_error
from jaxserve.api.generation import Reply, Usage, log_request, with_errors
from jaxserve.api.http import json_response, read_json, typed_event, typed_events
from jaxserve.api.response_events import new_id
from jaxserve.api.route import Route
from jaxserve.api.serving import Serving
from jaxserve.text.message import MessageDelta
from jaxserve.text.params import ParameterError


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run."""

    request: MessagesRequest
    turn: ChatTurn
    id: str
    fills_context: bool  # max_tokens is more than the context leaves: that ends the message instead
    builder: MessageBuilder

    @property
    def stream(self) -> bool:
        return bool(self.request.stream)


async def create_message(serving: Serving, http: Request) -> Response:
    """Every error is raised before the first byte of the reply."""
    return await ROUTE.respond(serving, http)


async def count_tokens(serving: Serving, http: Request) -> Response:
    """The body of a message without max_tokens -> {input_tokens}."""
    serving.require_ready()
    body = await read_json(http, serving.config.max_body_size)
    request = parse_messages_request(body | {"max_tokens": 1})
    turn, _ = await _begin_fitting(serving, request, body, 0)
    await turn.messages.aclose()
    return json_response({"input_tokens": turn.num_prompt})


async def _begin(serving: Serving, body: dict[str, Any], priority: int) -> Job:
    serving.require_ready()
    request = parse_messages_request(body)
    serving.check_model(request.model)
    turn, fills_context = await _begin_fitting(serving, request, body, priority)
    reply = Reply(new_id("msg"), "message", int(time.time()), request.model)
    running.also_known_as(reply.id)
    log_request(serving, reply, turn.request, turn.params, turn.num_prompt)
    return Job(request, turn, reply.id, fills_context, MessageBuilder(request.shows_thinking))


async def _begin_fitting(
    serving: Serving, request: MessagesRequest, body: dict[str, Any], priority: int
) -> tuple[ChatTurn, bool]:
    """-> (the turn, whether max_tokens was lowered to what the context leaves, as Anthropic does)."""

    async def begin(max_tokens: int | None) -> ChatTurn:
        try:
            chat = as_chat_request(request, body, max_tokens, serving.fields)
            return await begin_turn(serving, chat, priority)
        except (APIError, ParameterError) as error:
            raise in_our_words(error) from None

    try:
        return await begin(request.max_tokens), False
    except APIError as error:
        if error.code != "context_length_exceeded":
            raise
    return await begin(None), True


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts prompt tokens read from the cache apart from the others."""
    counts = usage.as_dict()
    cached = (counts.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counts["completion_tokens"],
    }


def _message(job: Job, content: list[Any], stop: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": job.id,
        "type": "message",
        "role": "assistant",
        "model": job.request.model,
        "content": content,
        **stop,
        "usage": {**_usage(job.turn.usage), "service_tier": "standard"},
    }


def _stop(job: Job, last: MessageDelta | None) -> dict[str, Any]:
    """stop_reason and stop_sequence, of the last delta."""
    matched = None if last is None else last.tokens.matched_stop
    if last is not None and last.finish_reason == "length":
        reason = "model_context_window_exceeded" if job.fills_context else "max_tokens"
        return {"stop_reason": reason, "stop_sequence": None}
    if job.builder.num_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": "end_turn", "stop_sequence": None}


async def _run(serving: Serving, job: Job) -> AsyncGenerator[list[Event], None]:
    """The events of a message, those of one delta at a time."""
    turn, builder = job.turn, job.builder
    last: MessageDelta | None = None
    try:
        async for _, delta in turn.messages:
            opening: list[Event] = []
            if last is None:
                started = _message(job, [], {"stop_reason": None, "stop_sequence": None})
                opening = [{"type": "message_start", "message": started}, {"type": "ping"}]
            last = delta
            if events := opening + builder.add(delta):
                yield events
    finally:
        await turn.messages.aclose()
    ending = {"type": "message_delta", "delta": _stop(job, last), "usage": _usage(turn.usage)}
    yield [*builder.close(), ending, {"type": "message_stop"}]


async def _whole(serving: Serving, job: Job) -> dict[str, Any]:
    stop: dict[str, Any] = {}
    async for events in _run(serving, job):
        for event in events:
            if event["type"] == "message_delta":
                stop = event["delta"]
    return _message(job, job.builder.content, stop)


def _events(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    """A failure after the first event is an event of its own; before it, raises."""
    return with_errors(typed_events(_run(serving, job)), lambda error: typed_event(anthropic_error(error)))


ROUTE: Route[Job] = Route(_begin, _whole, _events)
