"""A conversation at a terminal, and the /commands that change it. Knows no terminal and no network."""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "reasoning_effort"),
    *("chat_template_kwargs", "response_format", "regex", "ebnf"),
)


class CommandRefused(Exception):
    """A /command that cannot be followed; the message says why."""


class Leave(Exception):
    """The user wants to go."""


class Ask(Exception):
    """The conversation now ends with a question that wants an answer."""


@dataclass
class Conversation:
    """messages: of user and assistant in turn, without the system's."""

    model: str
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """What /v1/chat/completions gets."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        usage = {"stream_options": {"include_usage": True}}
        return {"model": self.model, "messages": said + self.messages} | usage | self.params

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """What came of the last question; nothing: the question is taken back."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.take_back()

    def take_back(self) -> str | None:
        """Removes the last question with its answer; returns the question."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                return last["content"]
        return None

    def set_param(self, name: str, text: str) -> None:
        """text: as JSON if it is some, else as it stands; nothing removes it. The server checks the value.

        Raises CommandRefused for a name that nobody knows.
        """
        if name not in PARAMS:
            close = difflib.get_close_matches(name, PARAMS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PARAMS)}"
            raise CommandRefused(f"{name} is no parameter; {hint}")
        if not text:
            self.params.pop(name, None)
            return
        try:
            self.params[name] = json.loads(text)
        except ValueError:
            self.params[name] = text

    def as_json(self) -> str:
        parts = {"model": self.model, "system": self.system, "params": self.params, "messages": self.messages}
        return json.dumps(parts, indent=1, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        said = [("System", self.system)] if self.system else []
        said += [("You" if each["role"] == "user" else self.model, each["content"]) for each in self.messages]
        return "".join(f"## {who}\n\n{text.strip()}\n\n" for who, text in said)

    def take_from_json(self, text: str) -> None:
        """What as_json wrote, or a bare list of OpenAI's messages. Raises CommandRefused."""
        try:
            content = json.loads(text)
            parts = {"messages": content} if isinstance(content, list) else content
            system, messages = parts.get("system"), [dict(each) for each in parts["messages"]]
            if messages and messages[0]["role"] == "system":
                system = messages.pop(0)["content"]
            if not all(each["role"] in ("user", "assistant") for each in messages):
                raise ValueError("messages of user and assistant are expected")
            if not all(isinstance(each["content"], str) for each in messages) or not isinstance(system, str | None):
                raise ValueError("content must be text")
            params = dict(parts.get("params") or {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandRefused(f"that file holds no conversation: {error!r}") from None
        self.system, self.messages, self.params = system, messages, params


def _help(talk: Conversation, argument: str) -> str:
    rows = [(f"/{name} {command.argument}".rstrip(), command.summary) for name, command in COMMANDS.items()]
    lines = [f"  {usage:<24}{summary}" for usage, summary in rows]
    return "\n".join([*lines, "", KEYS])


def _leave(talk: Conversation, argument: str) -> str:
    raise Leave


def _reset(talk: Conversation, argument: str) -> str:
    talk.messages.clear()
    return "a new conversation; system prompt and parameters stay"


def _system(talk: Conversation, argument: str) -> str:
    if argument:
        talk.system = None if argument == "-" else argument
    return "no system prompt" if talk.system is None else f"system prompt: {talk.system}"


def _params(talk: Conversation, argument: str) -> str:
    for part in re.split(r"\s+(?=\w+=)", argument) if argument else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise CommandRefused(f"{part} is no assignment; write it as in /params temperature=0.2 seed=1")
        talk.set_param(name, value)
    shown = " ".join(f"{name}={json.dumps(value)}" for name, value in talk.params.items())
    return shown or "no parameters are set: the model's defaults hold"


def _retry(talk: Conversation, argument: str) -> str:
    question = talk.take_back()
    if question is None:
        raise CommandRefused("nothing was asked yet")
    talk.ask(question)
    raise Ask


def _undo(talk: Conversation, argument: str) -> str:
    question = talk.take_back()
    if question is None:
        raise CommandRefused("nothing was asked yet")
    return f"taken back: {question}"


def _show(talk: Conversation, argument: str) -> str:
    return talk.as_markdown().strip() or "nothing was said yet"


def _save(talk: Conversation, argument: str) -> str:
    path = _path(argument, "save")
    try:
        path.write_text(talk.as_markdown() if path.suffix == ".md" else talk.as_json(), encoding="utf-8")
    except OSError as error:
        raise CommandRefused(f"{path}: {error.strerror}") from None
    return f"saved to {path}"


def _load(talk: Conversation, argument: str) -> str:
    path = _path(argument, "load")
    try:
        talk.take_from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandRefused(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CommandRefused(f"{path} is no text") from None
    return f"{len(talk.messages)} messages from {path}"


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise CommandRefused(f"/{command} needs the name of a file")
    return Path(argument).expanduser()


@dataclass(frozen=True)
class Command:
    """run: what it says, or Leave, Ask, CommandRefused."""

    run: Callable[[Conversation, str], str]
    summary: str
    argument: str = ""


COMMANDS = {
    "help": Command(_help, "this list"),
    "reset": Command(_reset, "start a new conversation"),
    "system": Command(_system, "show or set the system prompt; - for none", "[TEXT]"),
    "params": Command(_params, "show or set sampling parameters; NAME= unsets", "[NAME=VALUE ...]"),
    "retry": Command(_retry, "another answer to the last question"),
    "undo": Command(_undo, "take the last question and its answer back"),
    "show": Command(_show, "the conversation so far"),
    "save": Command(_save, "as JSON, or as Markdown for a name in .md", "FILE"),
    "load": Command(_load, "go on with a saved conversation", "FILE"),
    "exit": Command(_leave, "leave, as Ctrl-D does"),
}
ALIASES = {"quit": "exit", "bye": "exit", "new": "reset", "clear": "reset", "?": "help"}
KEYS = (
    'A line that ends in \\ goes on in the next one; lines between two """ are one\n'
    "message. Ctrl-C stops an answer, Ctrl-D leaves."
)


def follow(talk: Conversation, line: str) -> str:
    """Does what a line that begins with / says; returns what is to be shown. Raises Leave, Ask, CommandRefused."""
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{close[0]}?" if close else "/help lists the ones that exist"
        raise CommandRefused(f"there is no command /{name}; {hint}")
    return command.run(talk, argument.strip())
