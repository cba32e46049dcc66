"""`python -m jaxserve [flags]` and the console script `jaxserve`: serve a model, or one of the commands below.

Imports nothing heavy before a command line has been read.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.flags import parse_or_exit


def _serve(argv: list[str]) -> int:
    options = parse_or_exit(argv, epilog=_commands_help())
    from jaxserve.launch import launch

    return launch(options)


def _serve_model(argv: list[str]) -> int:
    """`jaxserve serve MODEL`, as vLLM has it: the model may stand first without its flag."""
    return _serve(["--model", *argv] if argv and not argv[0].startswith("-") else argv)


def _batch(argv: list[str]) -> int:
    from jaxserve.batch_flags import parse_or_exit

    job = parse_or_exit(argv)
    from jaxserve.offline import answer

    return answer(job)


def _plan(argv: list[str]) -> int:
    from jaxserve.plan_flags import parse_or_exit

    job = parse_or_exit(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: no accelerator is touched
    from jaxserve.planner.command import run

    return run(job)


def _chat(argv: list[str]) -> int:
    from jaxserve.terminal import chat

    return chat.main(argv)


def _bench(argv: list[str]) -> int:
    from jaxserve.terminal import bench

    return bench.main(argv)


@dataclass(frozen=True)
class Command:
    """run: the arguments after the command's name -> the process's exit code."""

    run: Callable[[list[str]], int]
    summary: str


COMMANDS = {
    "serve": Command(_serve_model, "serve a model, as jaxserve without a command does"),
    "chat": Command(_chat, "talk to a model at the terminal, or on a pipe"),
    "bench": Command(_bench, "send load to a server and measure what its clients see"),
    "plan": Command(_plan, "say whether a model fits accelerators that are not here"),
    "batch": Command(_batch, "answer a file of requests without a server"),
}


def _commands_help() -> str:
    lines = [f"  {name:<8}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["commands (jaxserve COMMAND --help says more):", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with the command's code: 0 ok, 2 what the user can mend, 130 interrupted, 1 anything else."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        sys.exit(COMMANDS[given[0]].run(given[1:]))
    if given and (close := difflib.get_close_matches(given[0], COMMANDS, n=1)):
        print(f"jaxserve: error: there is no command {given[0]}; did you mean {close[0]}?", file=sys.stderr)
        sys.exit(2)
    sys.exit(_serve(given))


if __name__ == "__main__":
    main()
