"""How one model speaks: the way it writes tool calls, whether it thinks first, and what its chat template knows of
both."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxserve.text.message_parser import Reading
from jaxserve.text.reasoning import CLOSE, OPEN, ThinkSplitter
from jaxserve.text.template_traits import TemplateTraits, shows_tools, traits_of
from jaxserve.text.tool_formats import FORMATS, ToolFormat

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer

TOOL_CALL_PARSERS = ("auto", *FORMATS, "none")
REASONING_PARSERS = ("auto", "deepseek-r1", "qwen3", "none")

Thinking = Literal["open", "inside", "over"]  # nothing is said of it; the prompt has begun it; it has ended it

_VARIABLES = ("enable_thinking", "thinking", "reasoning_effort")


@dataclass(frozen=True, slots=True)
class Dialect:
    """format: None where tool calls are not looked for. explained: the template does not describe tools in this format,
    so a system message does. thinks: the message may begin with <think>; always_thinks: it does even where no tag says
    so. variables: those of the template that are about thinking.
    """

    format: ToolFormat | None
    explained: bool = False
    thinks: bool = False
    always_thinks: bool = False
    with_tools: TemplateTraits = field(default_factory=TemplateTraits)  # of the template, where tools are given
    without_tools: TemplateTraits = field(default_factory=TemplateTraits)
    variables: frozenset[str] = frozenset()

    def reading(
        self,
        tokenizer: "Tokenizer",
        names: Collection[str],
        *,
        thinking: Thinking = "open",
        separate: bool = True,
        show: bool = True,
        stream: bool = True,
        skip_special_tokens: bool = True,
        one_call: bool = False,
    ) -> Reading:
        """How to read a message. names: of the functions that may be called. thinking: where the prompt leaves it.

        separate, show, stream: the client's separate_reasoning, include_reasoning, stream_reasoning.
        """
        calls = splitter = None
        form = self.format
        if names and form is not None:
            marker = tokenizer.backend.token_to_id(form.hidden) if form.hidden else None
            hidden = form.hidden if skip_special_tokens and marker in tokenizer.special_ids else ""
            calls = _maker(form, names, hidden)
        if self.thinks and thinking != "over":
            splitter = _splitter(thinking == "inside", self.always_thinks, separate)
        return Reading(splitter, calls, show, stream, tokenizer.backend.token_to_id(CLOSE), one_call)

    def kept_ids(self, tokenizer: "Tokenizer", reading: Reading) -> frozenset[int]:
        """Special tokens that the reading needs to see."""
        markers = (OPEN, CLOSE) if reading.splitter else ()
        if reading.calls and self.format:
            markers += self.format.markers
        ids = (tokenizer.backend.token_to_id(marker) for marker in markers)
        return frozenset(id_ for id_ in ids if id_ is not None) & tokenizer.special_ids


def _maker(form: ToolFormat, names: Collection[str], hidden: str):
    return lambda: form.parser(names, hidden)


def _splitter(inside: bool, expected: bool, separate: bool):
    return lambda: ThinkSplitter(inside=inside, expected=expected, separate=separate)


def dialect_of(tokenizer: "Tokenizer", tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> Dialect:
    """From the chat template, where the flags say "auto". Raises ValueError for another name than those above."""
    for given, allowed in ((tool_call_parser, TOOL_CALL_PARSERS), (reasoning_parser, REASONING_PARSERS)):
        if given not in allowed:
            raise ValueError(f"there is no parser {given!r}; {', '.join(allowed)} are")
    template = tokenizer.chat_template
    source = "" if template is None else "\n".join(template.sources.values())
    described = template is not None and shows_tools(template)
    known = _format_in(source) if described else None
    name = (known or "hermes") if tool_call_parser == "auto" else tool_call_parser
    explained = not described or (tool_call_parser == "auto" and known is None)
    return Dialect(
        format=FORMATS.get(name),
        explained=explained,
        thinks=reasoning_parser != "none" and (reasoning_parser != "auto" or CLOSE in source),
        always_thinks=reasoning_parser == "deepseek-r1",
        with_tools=TemplateTraits() if template is None else traits_of(template, True),
        without_tools=TemplateTraits() if template is None else traits_of(template, False),
        variables=frozenset(word for word in _VARIABLES if re.search(rf"\b{word}\b", source)),
    )


def _format_in(source: str) -> str | None:
    """The format that a template teaches; None for one that is not read here."""
    if "<tool_call>" in source and not re.search(r"<function=|<arg_key>|<parameter", source):
        return "hermes"
    if re.search(r"\[\s*func_name1\(|<\|python_start\|>", source):
        return "pythonic"
    if re.search(r'"parameters\\?": ', source) and re.search(r"<\|python_tag\|>|ipython", source):
        return "llama3"
    return None


def thinking_after(prompt: str, continued: str | None) -> Thinking:
    """continued: the message that the reply goes on with, if it does."""
    if continued is not None:
        return "inside" if OPEN in continued and CLOSE not in continued.rpartition(OPEN)[2] else "over"
    end = prompt.rstrip()
    return "inside" if end.endswith(OPEN) else "over" if end.endswith(CLOSE) else "open"
