"""`jaxserve chat`: a conversation at the terminal; on a pipe one question and its plain answer."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from jaxserve.terminal.conversation import COMMANDS, Ask, CommandRefused, Conversation, Leave, follow
from jaxserve.terminal.http import Server, ServerError
from jaxserve.terminal.screen import LineEditing, Style, history_path, read_message
from jaxserve.terminal.server import CommandError, add_arguments, address, find_or_start, server_flags

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
CLOSED_PIPE = 141  # and for a reader that went away


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxserve chat",
        usage="jaxserve chat [flags]",
        description="Talks to a model. On a terminal it is a conversation (/help lists its commands); with --prompt, "
        "or with a pipe as input or output, one question is answered without any control codes.",
        epilog="Exit codes: 0 done, 2 what you can mend, 130 interrupted, 1 anything else.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", help="one question; what comes on a pipe is put under it")
    add("--system", metavar="TEXT", help="system prompt")
    add("--temperature", metavar="T")
    add("--top-p", metavar="P")
    add("--max-tokens", metavar="N", help="of an answer")
    add("--seed", metavar="N", help="of sampling")
    add("--param", action="append", default=[], metavar="NAME=VALUE", help="any other field of the request; repeatable")
    add("--no-history", action="store_true", help="do not remember the lines that are typed")
    return parser


@dataclass
class Answer:
    """What came of a question. seconds: to the first text, and to the end."""

    text: str = ""
    first: float | None = None
    seconds: float = 0.0
    num_tokens: int = 0
    num_prompt: int = 0
    finish_reason: str | None = None
    stopped: bool = False  # by Ctrl-C

    def summary(self) -> str:
        parts = [f"{self.num_tokens} tokens"] if self.num_tokens else []
        if self.first is not None:
            parts.append(f"first after {self.first:.2f} s")
            if self.num_tokens > 1 and self.seconds > self.first:
                parts.append(f"{(self.num_tokens - 1) / (self.seconds - self.first):.1f} tokens/s")
        if self.num_prompt:
            parts.append(f"prompt {self.num_prompt}")
        if self.stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut off: /params max_tokens=... allows more")
        return ", ".join(parts)


def main(argv: Sequence[str]) -> int:
    """The process's exit code."""
    parser = arguments()
    args, rest = parser.parse_known_args(list(argv))
    try:
        if rest and not rest[0].startswith("-"):
            raise CommandError(f"unexpected argument {rest[0]!r}; a question is given by --prompt")
        flags = server_flags(parser, rest)
        question = _question(args.prompt)
        talk = Conversation("", args.system, _params(args))
        url, api_key = address(args.url, args.api_key, os.environ)
        with find_or_start(url, args.model, api_key, flags) as (server, talk.model):
            if question is not None:
                return _answer_once(server, talk, question)
            return _converse(server, talk, history=not args.no_history)
    except CommandError as error:
        print(f"jaxserve chat: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # So that the interpreter, which flushes at its end, does not fail there again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _question(prompt: str | None) -> str | None:
    """The one question that is asked without a conversation, or None. Raises CommandError."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    parts = [part for part in (prompt, piped) if part and part.strip()]
    if parts:
        return "\n\n".join(parts)
    if prompt is not None or not sys.stdin.isatty() or not sys.stdout.isatty():
        raise CommandError("nothing was asked: give a question by --prompt or on a pipe")
    return None


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Raises CommandError."""
    given = Conversation("")
    named = ("temperature", "top_p", "max_tokens", "seed")
    pairs = [f"{name}={value}" for name in named if (value := getattr(args, name)) is not None]
    for pair in [*pairs, *args.param]:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"--param {pair} is no assignment; write it as in --param top_k=20")
        try:
            given.set_param(name, value)
        except CommandRefused as error:
            raise CommandError(str(error)) from None
    return given.params


def _answer_once(server: Server, talk: Conversation, question: str) -> int:
    talk.ask(question)
    answer = Answer()
    try:
        _stream(server, talk, answer, Style(sys.stdout, {"TERM": "dumb"}), thoughts=False)
    except ServerError as error:
        if answer.text:
            print(flush=True)
        print(f"jaxserve chat: error: {error}", file=sys.stderr)
        return 2 if 400 <= error.status < 500 else 1
    except KeyboardInterrupt:
        print(flush=True)
        return INTERRUPTED
    if not answer.text.endswith("\n"):
        print(flush=True)
    return 0


def _converse(server: Server, talk: Conversation, *, history: bool) -> int:
    style = Style(sys.stdout, os.environ)
    print(style.dim(f"{talk.model} at {server.url}; /help lists commands, Ctrl-D leaves"))
    path = history_path(os.environ, os.path.expanduser("~")) if history else None
    with LineEditing(path, list(COMMANDS)):
        while True:
            try:
                if _next_turn(talk, style):
                    _answer(server, talk, style)
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return 0
            except Leave:
                return 0


def _next_turn(talk: Conversation, style: Style) -> bool:
    """Whether there is a question to be answered now."""
    said = read_message(style)
    if not said.startswith("/"):
        if said:
            talk.ask(said)
        return bool(said)
    try:
        print(style.dim(follow(talk, said)))
    except CommandRefused as error:
        print(style.dim(str(error)))
    except Ask:
        return True
    return False


def _answer(server: Server, talk: Conversation, style: Style) -> None:
    """Streams the answer to the last question; Ctrl-C keeps what there is of it."""
    answer = Answer()
    try:
        _stream(server, talk, answer, style)
    except KeyboardInterrupt:
        answer.stopped = True
    except ServerError as error:
        print(f"{_newline(answer.text)}{style.dim(f'error: {error}')}")
        talk.answer(answer.text)
        return
    talk.answer(answer.text)
    print(f"{_newline(answer.text)}{style.dim(f'[{answer.summary()}]')}\n", flush=True)


def _newline(text: str) -> str:
    return "" if not text or text.endswith("\n") else "\n"


def _stream(server: Server, talk: Conversation, answer: Answer, style: Style, *, thoughts: bool = True) -> None:
    """Prints pieces as they come and notes them in `answer`. Raises ServerError."""
    start, thinking = time.perf_counter(), False
    with closing(server.stream("/v1/chat/completions", talk.body())) as events:
        for event in events:
            if usage := event.get("usage"):
                answer.num_tokens, answer.num_prompt = usage["completion_tokens"], usage["prompt_tokens"]
            for choice in event.get("choices") or ():
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                delta = choice.get("delta") or {}
                thought, text = delta.get("reasoning_content") or "", delta.get("content") or ""
                if (thought or text) and answer.first is None:
                    answer.first = time.perf_counter() - start
                if thought and thoughts:
                    thinking = True
                    print(style.dim(thought), end="", flush=True)
                if text:
                    answer.text += text  # first, so that an interrupt loses nothing that was seen
                    print(("\n\n" if thinking else "") + text, end="", flush=True)
                    thinking = False
    answer.seconds = time.perf_counter() - start
