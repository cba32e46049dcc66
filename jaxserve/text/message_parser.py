"""Deltas of text -> deltas of a message: thinking, text and tool calls told apart while they arrive."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.text.generate import Delta
from jaxserve.text.json_call import CallBegin, Piece
from jaxserve.text.message import MessageDelta, ToolCallDelta
from jaxserve.text.reasoning import Segment, ThinkSplitter
from jaxserve.text.tool_calls import CallParser


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read the messages of one turn. splitter and calls make one for each message; None: not looked for."""

    splitter: Callable[[], ThinkSplitter] | None = None
    calls: Callable[[], CallParser] | None = None
    show_reasoning: bool = True
    stream_reasoning: bool = True  # False: thinking comes in one piece, when it is over
    think_end: int | None = None  # the token </think>, where it is one
    one_call: bool = False  # calls after a message's first are left out

    def parser(self) -> "MessageParser":
        return MessageParser(self)


class MessageParser:
    """One per message. reasoning_tokens counts those of the thinking, its tags included; where </think> is not one
    token, up to the end of the delta that ends it."""

    def __init__(self, reading: Reading, new_id: Callable[[], str] = new_call_id) -> None:
        self.reasoning_tokens = 0
        self._reading = reading
        self._splitter = reading.splitter() if reading.splitter else None
        self._calls = reading.calls() if reading.calls else None
        self._new_id = new_id
        self._num_calls = 0
        self._left_out = False
        self._num_first = 0  # tokens before the answer
        self._unsent = ""  # reasoning, where it is not streamed

    def advance(self, delta: Delta) -> MessageDelta:
        """delta, the next of this message, as what it says."""
        if self._splitter is None and self._calls is None:
            return MessageDelta(delta, content=delta.text, finish_reason=delta.finish_reason)
        final = delta.finish_reason is not None
        segments = self._split(delta, final)
        reasoning = "".join(segment.text for segment in segments if segment.kind == "reasoning")
        content, calls = self._answer(segments, final)
        finish_reason = delta.finish_reason
        if finish_reason == "stop" and self._num_calls:
            finish_reason = "tool_calls"
        return MessageDelta(delta, content, self._shown(reasoning, final), calls, finish_reason)

    def _split(self, delta: Delta, final: bool) -> list[Segment]:
        if self._splitter is None:
            return [Segment("answer", delta.text)]
        answering = self._splitter.answering
        segments = self._splitter.push(delta.text, final)
        if not answering:
            end = self._reading.think_end
            passed = end is not None and end in delta.token_ids
            self._num_first += delta.token_ids.index(end) + 1 if passed else len(delta.token_ids)
        if self._splitter.thought:
            self.reasoning_tokens = self._num_first
        return segments

    def _shown(self, reasoning: str, final: bool) -> str:
        if not self._reading.show_reasoning:
            return ""
        if self._reading.stream_reasoning:
            return reasoning
        self._unsent += reasoning
        if self._splitter is not None and self._splitter.thinking and not final:
            return ""
        reasoning, self._unsent = self._unsent, ""
        return reasoning

    def _answer(self, segments: list[Segment], final: bool) -> tuple[str, tuple[ToolCallDelta, ...]]:
        content: list[str] = []
        calls: list[ToolCallDelta] = []
        for segment in segments:
            if segment.kind == "thought_aloud" or (segment.kind == "answer" and self._calls is None):
                content.append(segment.text)
            elif segment.kind == "answer":
                assert self._calls is not None
                self._sort(self._calls.push(segment.text), content, calls)
        if final and self._calls is not None:
            self._sort(self._calls.push("", final=True), content, calls)
        return "".join(content), tuple(calls)

    def _sort(self, pieces: list[Piece], content: list[str], calls: list[ToolCallDelta]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                content.append(piece)
                continue
            begins = isinstance(piece, CallBegin)
            self._left_out = self._left_out or (begins and self._reading.one_call and self._num_calls > 0)
            if self._left_out:
                continue
            if begins:
                calls.append(ToolCallDelta(self._num_calls, id=self._new_id(), name=piece.name))
                self._num_calls += 1
            else:
                calls.append(ToolCallDelta(self._num_calls - 1, piece.text))
