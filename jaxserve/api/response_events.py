"""A Response as it grows: message deltas in, OpenAI's typed events out, and the same Response whether they are sent or
not (OpenAI API reference, "Responses", "Streaming events").

The output is a list of items in the order of their first delta: reasoning, message, function_call. One is open at a
time.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.text.message import MessageDelta, ToolCallDelta

Event = dict[str, Any]
Entries = Callable[[MessageDelta], list[dict[str, Any]]]

_ID_PREFIX = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
# What the events of an item's text are called: of the part that holds it, or of the arguments.
_TEXT_EVENT = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
OBFUSCATION_BLOCK = 16  # characters that a padded delta is a multiple of


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass
class _Item:
    """An output item on its way."""

    kind: str  # reasoning, message or function_call
    index: int  # in the output
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self) -> dict[str, Any]:
        """The content part that holds the text so far."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def as_dict(self, status: str, *, opened: bool = False) -> dict[str, Any]:
        """opened: as it is announced, without what it holds."""
        head = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if opened else [self.part()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content, "encrypted_content": None}
        return {**head, "role": "assistant", "content": content}


class ResponseBuilder:
    """response: the Response as it begins, with an empty output. entries: the log-probabilities of a delta, None where
    none were asked for. obfuscate: pads deltas, so that their sizes tell less of the text.

    begin(), add() for every delta of the message, then finish() or fail(); each returns the next events.
    """

    def __init__(self, response: Mapping[str, Any], entries: Entries | None = None, obfuscate: bool = False) -> None:
        self._response: dict[str, Any] = {**response, "status": "in_progress", "output": []}
        self._entries, self._obfuscate = entries, obfuscate
        self._item: _Item | None = None
        self._num_events = self._num_calls = 0
        self._waiting: list[dict[str, Any]] = []  # log-probabilities of tokens whose text has not come yet

    @property
    def response(self) -> dict[str, Any]:
        """The Response as it stands."""
        return {**self._response, "output": list(self._response["output"])}

    def update(self, **fields: Any) -> None:
        self._response.update(fields)

    def begin(self) -> list[Event]:
        return [self._event(f"response.{kind}", response=self.response) for kind in ("created", "in_progress")]

    def add(self, delta: MessageDelta) -> list[Event]:
        events: list[Event] = []
        if self._entries is not None:
            self._waiting += self._entries(delta)
        # What is left of a call that is open was said before anything else of this delta.
        open_call = self._num_calls - 1 if self._item is not None and self._item.kind == "function_call" else None
        for part in delta.tool_calls:
            if part.index == open_call:
                events += self._call(part)
        if delta.reasoning:
            events += self._text("reasoning", delta.reasoning)
        if delta.content:
            events += self._text("message", delta.content)
        for part in delta.tool_calls:
            if part.index != open_call:
                events += self._call(part)
        if delta.reasoning or delta.tool_calls:
            self._waiting.clear()  # they belong to what is no message
        return events

    def finish(self, finish_reason: str | None, usage: Mapping[str, Any]) -> list[Event]:
        """finish_reason: of the last delta; "length" leaves the Response incomplete."""
        cut = finish_reason == "length"
        status = "incomplete" if cut else "completed"
        events = [] if self._response["output"] or self._item is not None else self._open("message")
        if self._item is not None and self._item.kind == "message":
            self._item.logprobs += self._waiting
        events += self._close(status)
        if cut:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._response["completed_at"] = int(time.time())
        self._response |= {"status": status, "usage": dict(usage)}
        return events

    def end(self) -> list[Event]:
        """The last event, after finish() or fail()."""
        return [self._event(f"response.{self._response['status']}", response=self.response)]

    def fail(self, code: str, message: str) -> None:
        """Items that were complete stay; the open one is kept as incomplete."""
        self._close("incomplete")
        self._response |= {"status": "failed", "error": {"code": code, "message": message}}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._item is None or self._item.kind != kind:
            events = self._close("completed") + self._open(kind)
        return [*events, self._delta(text)]

    def _call(self, part: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if part.index == self._num_calls:
            self._num_calls += 1
            events = self._close("completed") + self._open("function_call", part.id or new_id("call"), part.name or "")
        return [*events, self._delta(part.arguments)] if part.arguments else events

    def _delta(self, text: str) -> Event:
        item = self._item
        assert item is not None
        item.texts.append(text)
        fields = {**self._place(item), "delta": text}
        if item.kind == "message":
            item.logprobs += self._waiting
            fields["logprobs"], self._waiting = self._waiting, []
        if self._obfuscate:
            fields["obfuscation"] = secrets.token_hex(OBFUSCATION_BLOCK)[: -len(text) % OBFUSCATION_BLOCK]
        return self._event(_TEXT_EVENT[item.kind] + ".delta", **fields)

    def _place(self, item: _Item) -> dict[str, Any]:
        place = {"item_id": item.id, "output_index": item.index}
        return place if item.kind == "function_call" else {**place, "content_index": 0}

    def _open(self, kind: str, call_id: str = "", name: str = "") -> list[Event]:
        index = len(self._response["output"])
        item = self._item = _Item(kind, index, new_id(_ID_PREFIX[kind]), call_id=call_id, name=name)
        shown = item.as_dict("in_progress", opened=True)
        events = [self._event("response.output_item.added", output_index=index, item=shown)]
        if kind != "function_call":
            events.append(self._event("response.content_part.added", **self._place(item), part=item.part()))
        return events

    def _close(self, status: str) -> list[Event]:
        """Ends the open item, if there is one, and takes it into the output."""
        item, self._item = self._item, None
        if item is None:
            return []
        name, place, done = _TEXT_EVENT[item.kind] + ".done", self._place(item), item.as_dict(status)
        if item.kind == "function_call":
            events = [self._event(name, **place, name=item.name, arguments=item.text)]
        else:
            logprobs = {"logprobs": list(item.logprobs)} if item.kind == "message" else {}
            events = [
                self._event(name, **place, text=item.text, **logprobs),
                self._event("response.content_part.done", **place, part=item.part()),
            ]
        events.append(self._event("response.output_item.done", output_index=item.index, item=done))
        self._response["output"].append(done)
        return events
