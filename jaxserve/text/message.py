"""What an assistant says, piece by piece: text, reasoning and tool calls, told apart."""

from dataclasses import dataclass, field

from jaxserve.text.generate import Delta


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of one tool call. id and name come whole with its first delta, and only then."""

    index: int  # among the calls of this message
    arguments: str = ""  # a fragment of JSON text
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """What is new of one message. tokens is what it was made of: the ids, log-probabilities and the end."""

    tokens: Delta
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None  # stop, length or tool_calls; exactly one delta of a message has it, its last


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """The sum of MessageDeltas: the same whether it was streamed or not."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: MessageDelta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        for part in delta.tool_calls:
            if part.index == len(self.tool_calls):
                assert part.id is not None and part.name is not None
                self.tool_calls.append(ToolCall(part.id, part.name))
            self.tool_calls[part.index].arguments += part.arguments
        self.finish_reason = delta.finish_reason or self.finish_reason
