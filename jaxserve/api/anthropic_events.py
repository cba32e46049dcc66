"""A Message as it grows: message deltas in, Anthropic's events out, and the same Message whether they are sent or not
(Anthropic API reference, "Messages", "Streaming messages").

The content is a list of blocks in the order of their first delta: thinking, text, tool_use. One is open at a time.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import orjson

from jaxserve.text.message import MessageDelta, ToolCallDelta

Event = dict[str, Any]


@dataclass
class _Block:
    kind: str  # thinking, text or tool_use
    index: int
    id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def opening(self) -> dict[str, Any]:
        """The block as it is announced."""
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""}

    def whole(self) -> dict[str, Any]:
        if self.kind == "tool_use":
            return {**self.opening(), "input": _input(self.text)}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": self.text, "signature": _signature(self.text)}
        return {"type": "text", "text": self.text}

    def delta(self, text: str) -> dict[str, Any]:
        if self.kind == "tool_use":
            return {"type": "input_json_delta", "partial_json": text}
        if self.kind == "thinking":
            return {"type": "thinking_delta", "thinking": text}
        return {"type": "text_delta", "text": text}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; {} for those that were cut off in their middle."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {"value": value}


def _signature(thinking: str) -> str:
    """Clients drop thinking that has none. It proves nothing, and nothing here reads it."""
    return hashlib.sha256(thinking.encode("utf-8", "replace")).hexdigest()


class MessageBuilder:
    """content grows with add() for every delta; each returns the next events; close() ends the last block."""

    def __init__(self, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self.content: list[dict[str, Any]] = []
        self.num_calls = 0
        self._block: _Block | None = None

    def add(self, delta: MessageDelta) -> list[Event]:
        events: list[Event] = []
        # What is left of a call that is open was said before anything else of this delta.
        open_call = self.num_calls - 1 if self._block is not None and self._block.kind == "tool_use" else None
        for part in delta.tool_calls:
            if part.index == open_call:
                events += self._call(part)
        if delta.reasoning and self.show_thinking:
            events += self._text("thinking", delta.reasoning)
        if delta.content:
            events += self._text("text", delta.content)
        for part in delta.tool_calls:
            if part.index != open_call:
                events += self._call(part)
        return events

    def close(self) -> list[Event]:
        block, self._block = self._block, None
        if block is None:
            return []
        whole = block.whole()
        self.content.append(whole)
        events: list[Event] = []
        if block.kind == "thinking":
            signed = {"type": "signature_delta", "signature": whole["signature"]}
            events.append({"type": "content_block_delta", "index": block.index, "delta": signed})
        return [*events, {"type": "content_block_stop", "index": block.index}]

    def _text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._block is None or self._block.kind != kind:
            events = self._open(_Block(kind, 0))
        return [*events, self._delta(text)]

    def _call(self, part: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if part.index == self.num_calls:
            self.num_calls += 1
            call_id = "toolu_" + (part.id or "").removeprefix("call_")
            events = self._open(_Block("tool_use", 0, call_id, part.name or ""))
        return [*events, self._delta(part.arguments)] if part.arguments else events

    def _open(self, block: _Block) -> list[Event]:
        events = self.close()
        block.index, self._block = len(self.content), block
        return [*events, {"type": "content_block_start", "index": block.index, "content_block": block.opening()}]

    def _delta(self, text: str) -> Event:
        block = self._block
        assert block is not None
        block.texts.append(text)
        return {"type": "content_block_delta", "index": block.index, "delta": block.delta(text)}
