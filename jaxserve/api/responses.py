"""/v1/responses (OpenAI API reference, "Responses"): answers that are kept, and conversations that go on from them.

A response is stored whole, with the conversation before it, so it needs no other to be read or gone on from.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from fastapi import Request
from starlette.responses import Response

from jaxserve.api import running
from jaxserve.api.chat_turn import ChatTurn, begin_turn
from jaxserve.api.errors import APIError, invalid_request, not_found
from jaxserve.api.generation import Reply, Usage, log_request, with_errors
from jaxserve.api.http import json_response, read_json, typed_event, typed_events
from jaxserve.api.logprobs import chat_logprobs
from jaxserve.api.paging import integer_query, page_object
from jaxserve.api.response_events import Entries, Event, ResponseBuilder, new_id
from jaxserve.api.response_items import Item, check_calls, checked_items, cuts_of
from jaxserve.api.response_request import ResponseRequest, as_chat_request, in_our_words, parse_response_request
from jaxserve.api.route import Route
from jaxserve.api.serving import Serving
from jaxserve.store import NoSuchResponse, StoredResponse, StoreError
from jaxserve.text.message import MessageDelta
from jaxserve.text.params import ParameterError

log = logging.getLogger(__name__)
T = TypeVar("T")

RETENTION = 30 * 86_400  # seconds that a response is kept, as OpenAI's
MAX_ITEMS = 10_000  # of one conversation
_MARGIN = 8  # levels that an event or a batch line puts around a response


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run."""

    request: ResponseRequest
    turn: ChatTurn
    items: list[Item]  # what the model is given: the conversation so far and the new input
    own_ids: tuple[str, ...]  # of the new input's items, as far as they are ours to name
    builder: ResponseBuilder

    @property
    def stream(self) -> bool:
        return bool(self.request.stream)


async def create_response(serving: Serving, http: Request) -> Response:
    """Every error is raised before the first byte of the reply."""
    return await ROUTE.respond(serving, http)


async def count_input_tokens(serving: Serving, http: Request) -> Response:
    """The body of a response -> {object: "response.input_tokens", input_tokens}; nothing is generated or stored."""
    serving.require_ready()
    body = await read_json(http, serving.config.max_body_size)
    body.setdefault("model", serving.model_names[0])
    request = parse_response_request(body | {"stream": False, "stream_options": None})
    items, _ = await _conversation(serving, request)
    _, turn = await _begin_fitting(serving, request, body, items, 0)
    await turn.messages.aclose()
    return json_response({"object": "response.input_tokens", "input_tokens": turn.num_prompt})


async def _begin(serving: Serving, body: dict[str, Any], priority: int) -> Job:
    serving.require_ready()
    request = parse_response_request(body)
    if request.store and serving.store is None:
        serving.require_store()
    serving.check_model(request.model)
    items, own_ids = await _conversation(serving, request)
    items, turn = await _begin_fitting(serving, request, body, items, priority)
    reply = Reply(new_id("resp"), "response", _now(serving), request.model)
    response = _response_object(serving, request, reply, turn)
    _check_depth(response)
    entries = _entries(serving) if request.wants_logprobs else None
    options = request.stream_options
    builder = ResponseBuilder(response, entries, obfuscate=bool(options and options.include_obfuscation))
    running.also_known_as(reply.id)
    log_request(serving, reply, turn.request, turn.params, turn.num_prompt)
    return Job(request, turn, items, own_ids, builder)


def _now(serving: Serving) -> int:
    return int(serving.clock())


async def _conversation(serving: Serving, request: ResponseRequest) -> tuple[list[Item], tuple[str, ...]]:
    """-> (the items before this response, the ids of those that are new). Raises APIError."""
    _check_number(request.input if isinstance(request.input, list) else ())
    new = checked_items([] if request.input is None else request.input)
    if not new and request.previous_response_id is None and not request.instructions:
        raise invalid_request("You must provide the field 'input'.", "input", "missing_required_parameter")
    before: list[Item] = []
    if request.previous_response_id is not None:
        before = await _before(serving, request.previous_response_id)
    new = [await _resolved(serving, item) for item in new]
    items = before + new
    _check_number(items)
    check_calls(items)
    given = set() if not isinstance(request.input, list) else {i["id"] for i in request.input if "id" in i}
    return items, tuple(item["id"] for item in new if item["id"] not in given)


def _check_number(items: Sequence[Any]) -> None:
    if len(items) > MAX_ITEMS:
        message = f"The conversation has {len(items)} items; at most {MAX_ITEMS} are allowed."
        raise invalid_request(message, "input", "invalid_value")


async def _before(serving: Serving, response_id: str) -> list[Item]:
    """The conversation up to and with an earlier response."""
    try:
        stored = await _in_thread(serving.require_store().responses.get, response_id)
    except NoSuchResponse:
        message = f"Previous response with id '{response_id[:100]}' not found."
        raise invalid_request(message, "previous_response_id", "previous_response_not_found") from None
    return _items_of(stored)


def _items_of(stored: StoredResponse) -> list[Item]:
    """The conversation up to and with that response. Log-probabilities stay with the response."""
    items = [*orjson.loads(stored.input_items), *orjson.loads(stored.body)["output"]]
    for part in (part for item in items if item["type"] == "message" for part in item["content"]):
        if "logprobs" in part:
            part["logprobs"] = []
    return items


async def _resolved(serving: Serving, item: Item) -> Item:
    """A reference -> the item it names."""
    if item["type"] != "item_reference":
        return item
    item_id = item["id"]
    try:
        stored = await _in_thread(serving.require_store().responses.with_item, item_id)
        return next(each for each in _items_of(stored) if each["id"] == item_id)
    except (NoSuchResponse, StopIteration):
        raise not_found(f"Item with id '{item_id[:100]}' not found.", "input", None) from None


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    return await asyncio.to_thread(function, *args)  # the store waits for the disk


async def _begin_fitting(
    serving: Serving, request: ResponseRequest, body: dict[str, Any], items: list[Item], priority: int
) -> tuple[list[Item], ChatTurn]:
    """-> (the items that the model is given, the turn over them).

    truncation "auto" drops as few of the oldest items as make the rest fit. Raises APIError.
    """

    async def begin(kept: list[Item]) -> ChatTurn:
        try:
            return await begin_turn(serving, as_chat_request(request, body, kept, serving.fields), priority)
        except (APIError, ParameterError) as error:
            raise in_our_words(error) from None

    try:
        return items, await begin(items)
    except APIError as error:
        if request.truncation != "auto" or error.code != "context_length_exceeded":
            raise
        refused = error
    cuts, found = cuts_of(items), None
    low, high = 0, len(cuts) - 1
    while low <= high:
        middle = (low + high) // 2
        kept = items[cuts[middle] :]
        try:
            turn = await begin(kept)
        except APIError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
            continue
        found, high = (kept, turn), middle - 1  # a turn that is not read has begun nothing
    if found is None:
        raise refused
    return found


def _response_object(serving: Serving, request: ResponseRequest, reply: Reply, turn: ChatTurn) -> dict[str, Any]:
    """OpenAI's Response before anything was generated; sampling parameters as they are in force."""
    text = request.text
    text_format = (text and text.format) or {"type": "text"}
    reasoning = request.reasoning
    return {
        "id": reply.id,
        "object": "response",
        "created_at": reply.created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": True if request.parallel_tool_calls is None else request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "effort": reasoning and reasoning.effort,
            "summary": reasoning and (reasoning.summary or reasoning.generate_summary),
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": serving.store is not None and request.store is not False,
        "temperature": turn.params[0].temperature,
        "text": {"format": text_format, "verbosity": (text and text.verbosity) or "medium"},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": request.tools,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": turn.params[0].top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def _check_depth(response: dict[str, Any]) -> None:
    """What is echoed must be possible to write: JSON is read to a greater depth than it is written."""
    wrapped: Any = response
    for _ in range(_MARGIN):
        wrapped = [wrapped]
    try:
        orjson.dumps(wrapped)
    except orjson.JSONEncodeError:
        raise invalid_request("'tools', 'tool_choice' or 'text.format' is nested too deeply.", "tools") from None


def _entries(serving: Serving) -> Entries:
    tokenizer, _ = serving.require_ready()

    def entries(delta: MessageDelta) -> list[dict[str, Any]]:
        tokens = delta.tokens
        return [] if not tokens.logprobs else chat_logprobs(tokenizer, tokens.token_ids, tokens.logprobs)["content"]

    return entries


def _usage(usage: Usage) -> dict[str, Any]:
    counts = usage.as_dict()
    prompt = counts.get("prompt_tokens_details") or {}
    completion = counts.get("completion_tokens_details") or {}
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": prompt.get("cached_tokens", 0), "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": completion.get("reasoning_tokens", 0)},
        "total_tokens": counts["total_tokens"],
    }


async def _run(serving: Serving, job: Job) -> AsyncGenerator[list[Event], None]:
    """The events of a response, those of one delta at a time. It is stored before its last event."""
    turn, builder = job.turn, job.builder
    finish_reason: str | None = None
    begun = False
    try:
        async for _, delta in turn.messages:
            opening = [] if begun else builder.begin()
            begun, finish_reason = True, delta.finish_reason
            if events := opening + builder.add(delta):
                yield events
    finally:
        await turn.messages.aclose()
    yield builder.finish(finish_reason, _usage(turn.usage))
    await _keep(serving, job)
    yield builder.end()


async def _keep(serving: Serving, job: Job) -> None:
    """Stores the response, unless that is not wanted. `store` in it says what is true: where the client did not ask for
    it in so many words, a store that fails costs it the stored copy and not the answer."""
    response = job.builder.response
    if not response["store"]:
        return
    ids = (*job.own_ids, *(item["id"] for item in response["output"]))
    created = response["created_at"]
    body, items = orjson.dumps(response), orjson.dumps(job.items)
    stored = StoredResponse(response["id"], body, items, created, created + RETENTION, ids)
    try:
        await _in_thread(serving.require_store().responses.put, [stored])
    except StoreError as error:
        if job.request.store:
            raise
        log.error("response %s is not stored: %s", response["id"], error)
        job.builder.update(store=False)


async def _whole(serving: Serving, job: Job) -> dict[str, Any]:
    async for _ in _run(serving, job):
        pass
    return job.builder.response


def _events(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    """A failure after the first event is told by response.failed; before it, raises."""

    def failed(error: APIError) -> bytes:
        job.builder.fail("server_error", error.message)
        job.builder.update(store=False)
        return b"".join(map(typed_event, job.builder.end()))

    return with_errors(typed_events(_run(serving, job)), failed)


async def _find(serving: Serving, http: Request) -> StoredResponse:
    response_id = http.path_params["response_id"]
    try:
        return await _in_thread(serving.require_store().responses.get, response_id)
    except NoSuchResponse:
        raise _no_such_response(response_id) from None


def _no_such_response(response_id: str) -> APIError:
    return not_found(f"Response with id '{response_id[:100]}' not found.", "response_id", None)


async def get_response(serving: Serving, http: Request) -> Response:
    """A stored response, as it was returned."""
    stored = await _find(serving, http)
    if http.query_params.get("stream") == "true":
        message = "Only responses made in the background can be streamed again, and this server makes none."
        raise invalid_request(message, "stream", "unsupported_parameter")
    return Response(stored.body, media_type="application/json")


async def delete_response(serving: Serving, http: Request) -> Response:
    """Responses that went on from it keep their copy of the conversation."""
    response_id = http.path_params["response_id"]
    try:
        await _in_thread(serving.require_store().responses.delete, response_id)
    except NoSuchResponse:
        raise _no_such_response(response_id) from None
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(serving: Serving, http: Request) -> Response:
    """400: only responses made in the background can be cancelled, and this server makes none."""
    stored = await _find(serving, http)
    message = f"Response '{stored.id}' was not made in the background; close the connection to end one that runs."
    raise invalid_request(message, "response_id")


async def list_input_items(serving: Serving, http: Request) -> Response:
    """Query: after, limit (1 to 100), order (asc, or desc, the default). The whole conversation before the response."""
    items: list[Item] = orjson.loads((await _find(serving, http)).input_items)
    query = http.query_params
    limit, order, after = integer_query(http, "limit", 20, 1, 100), query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        message = f"Invalid value: '{order[:100]}'. Supported values are: 'asc' and 'desc'."
        raise invalid_request(message, "order", "invalid_value")
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise not_found(f"Item with id '{after[:100]}' not found.", "after", None)
        items = items[place + 1 :]
    return json_response(page_object(items[:limit], len(items) > limit))


ROUTE: Route[Job] = Route(_begin, _whole, _events)
