"""The command line of `jaxserve plan`. Imports nothing heavy."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.cluster_flags import refuse_several
from jaxserve.flags import FlagError, Options
from jaxserve.flags import parse as parse_flags


@dataclass(frozen=True, slots=True)
class PlanJob:
    """A parsed command line. topologies: one is planned in full, several (or none) are compared."""

    topologies: tuple[str, ...]
    context: int | None
    users: int | None
    compile_steps: bool
    as_json: bool
    options: Options


def parse(argv: Sequence[str]) -> PlanJob:
    """Raises FlagError; --help prints and exits."""
    parser = argparse.ArgumentParser(
        prog="jaxserve plan",
        description="Says whether a model fits accelerators that are not here, how many users they would serve and how "
        "fast at best. No weights are read: a config.json is enough. The engine's own steps are compiled where the "
        "compiler is installed; nothing is run.",
        epilog="--model takes a folder with config.json, that file, a .gguf, a hub name fetched before, or a known "
        "architecture (SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B, Llama-3.3-70B, Qwen3-32B). All other flags are those "
        "of the server (--dtype, --max-running-requests, --mem-fraction-static, --max-model-len …): see jaxserve "
        "--help. Exit codes: 0 it fits (of several: one of them does), 1 it does not, 2 what you can mend.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology",
        action="append",
        default=[],
        metavar="SLICE",
        help="as v6e:2x4, v5p:2x2x1, tpu7x:2x2x1, h200:8 or cpu; given several times, or not at all: a table",
    )
    parser.add_argument("--context", type=_positive, metavar="N", help="tokens of each user (default: 8192)")
    parser.add_argument("--users", type=_positive, metavar="N", help="that must fit together (default: one)")
    parser.add_argument("--no-compile", action="store_true", help="only the arithmetic: seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object, or of several slices an array")
    given, rest = parser.parse_known_args(list(argv))
    options = parse_flags(rest)
    refuse_several(options.cluster, "--topology names a slice with all of its machines")
    return PlanJob(tuple(given.topology), given.context, given.users, not given.no_compile, given.json, options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def parse_or_exit(argv: Sequence[str]) -> PlanJob:
    """parse() for a program: a FlagError is printed and the process exits with 2."""
    try:
        return parse(argv)
    except FlagError as error:
        print(f"jaxserve plan: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
