"""The command line of `jaxserve batch`. Imports nothing heavy."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.cluster_flags import refuse_several
from jaxserve.flags import FlagError, Options
from jaxserve.flags import parse as parse_flags

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True, slots=True)
class Job:
    """A parsed command line. Paths; "-" is standard input or output."""

    input: str
    output: str
    error_file: str | None
    endpoint: str | None
    options: Options

    @property
    def journal(self) -> Path | None:
        """None where the output has no place beside it."""
        return None if self.output == "-" else Path(self.output + ".journal")


def parse(argv: Sequence[str]) -> Job:
    """Raises FlagError; --help prints and exits."""
    parser = argparse.ArgumentParser(
        prog="jaxserve batch",
        description="Answers a file of requests in OpenAI's batch format, without a server. The same command goes on "
        "where it was interrupted.",
        epilog="All other flags are those of the server: see jaxserve --help. Exit codes: 0 done (requests that failed "
        "have their error in the output), 2 what you can mend, 130 interrupted, 1 anything else.",
        allow_abbrev=False,
    )
    parser.add_argument("-i", "--input-file", "--input", required=True, metavar="FILE", help="requests; - for stdin")
    parser.add_argument("-o", "--output-file", "--output", required=True, metavar="FILE", help="- for stdout")
    parser.add_argument("--error-file", metavar="FILE", help="requests that failed go there (default: the output)")
    parser.add_argument(
        "--endpoint",
        choices=ENDPOINTS,
        metavar="PATH",
        help=f"{', '.join(ENDPOINTS)} (default: what the first line names)",
    )
    given, rest = parser.parse_known_args(list(argv))
    options = parse_flags(rest)
    refuse_several(options.cluster, "it works on one machine; serve with --nnodes, and send it to /v1/batches")
    return Job(given.input_file, given.output_file, given.error_file, given.endpoint, options)


def parse_or_exit(argv: Sequence[str]) -> Job:
    """parse() for a program: a FlagError is printed and the process exits with 2."""
    try:
        return parse(argv)
    except FlagError as error:
        print(f"jaxserve batch: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
