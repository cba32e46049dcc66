"""`jaxserve bench`: load on a server, and what its clients see of it."""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.flag_values import at_least, positive
from jaxserve.terminal.figures import comparison, summarise, table
from jaxserve.terminal.http import Server
from jaxserve.terminal.load import Load, Reply, make_prompts, run
from jaxserve.terminal.server import CommandError, add_arguments, address, find_or_start, server_flags

OTHER_SEED = 1_000_003  # between two sets of prompts, so that none is a prefix of what is measured
INTERRUPTED = 130


class Interrupted(Exception):
    """Ctrl-C; results: of the requests that had ended."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        super().__init__()
        self.results = results


def arguments(prog: str = "jaxserve bench") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [flags]",
        description="Sends requests to an OpenAI server and prints what a client sees: tokens a second, time to the "
        "first token (TTFT), per later token (TPOT), between two pieces of text (ITL), to the end (E2E).",
        epilog="Exit codes: 0 done, 1 requests failed, 2 what you can mend, 130 interrupted.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    add = parser.add_argument
    add("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    add("--num-prompts", type=positive, default=64, metavar="N", help="requests to measure (default: 64)")
    add(
        "--max-concurrency",
        type=positive,
        nargs="+",
        metavar="N",
        help="requests in flight at most; several: one run for each, compared in a table (default: no limit)",
    )
    add("--request-rate", type=_rate, default=float("inf"), metavar="R", help="requests/s (default: all at once)")
    add("--input-len", "--random-input-len", type=positive, default=94, metavar="N", help=_words("words of a prompt"))
    add("--prefix-len", type=at_least(0), default=0, metavar="N", help="words that all prompts begin with, more")
    add("--output-len", "--random-output-len", type=positive, default=64, metavar="N", help="tokens (default: 64)")
    add("--prompts", type=Path, metavar="FILE", help="JSON list of prompts, used instead of generated ones")
    add("--warmup", type=at_least(0), default=2, metavar="N", help="requests before the measured ones (default: 2)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    add("--seed", type=int, default=0, metavar="N", help="of prompts, arrival times and sampling (default: 0)")
    add("--no-ignore-eos", action="store_true", help="for servers that refuse ignore_eos")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (default: 600)")
    add("--json", action="store_true", help="print the figures as JSON instead of a table")
    add("--output", type=Path, metavar="FILE", help="write the JSON there too")
    return parser


def _words(text: str) -> str:
    return f"{text}, nearly a token each (default: 94)"


def _rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give requests per second above 0, or inf")
    return value


def main(argv: Sequence[str]) -> int:
    """The process's exit code."""
    parser = arguments()
    args, rest = parser.parse_known_args(list(argv))
    try:
        flags = server_flags(parser, rest)
        url, api_key = address(args.url, args.api_key, os.environ)
        with find_or_start(url, args.model, api_key, flags) as (server, model):
            results = measure(args, server, model)
    except CommandError as error:
        print(f"jaxserve bench: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print("interrupted; the figures are of the requests that had ended", file=sys.stderr)
        if interrupted.results:
            report(args, interrupted.results)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted before anything was sent", file=sys.stderr)
        return INTERRUPTED
    return report(args, results)


def measure(args: argparse.Namespace, server: Server, model: str) -> list[dict[str, Any]]:
    """One result for each --max-concurrency. Raises CommandError, Interrupted."""
    results: list[dict[str, Any]] = []
    for warmup, load in loads(args, server, model):
        ended: list[Reply] = []
        start = time.perf_counter()
        try:
            asyncio.run(run(warmup))
            start = time.perf_counter()
            with _progress(load, ended) as on_reply:
                replies, seconds = asyncio.run(run(load, on_reply))
        except KeyboardInterrupt:
            partly = [summarise(load, ended, time.perf_counter() - start)] if ended else []
            raise Interrupted(results + partly) from None
        results.append(summarise(load, replies, seconds))
    return results


def loads(args: argparse.Namespace, server: Server, model: str) -> list[tuple[Load, Load]]:
    """-> what is sent before, and what is measured, for each --max-concurrency. Raises CommandError."""
    prompts = _prompts_of(args.prompts)
    plain = Load(
        base_url=server.url,
        api_key=server.api_key,
        model=model,
        prompts=(),
        output_len=args.output_len,
        chat=args.chat,
        ignore_eos=not args.no_ignore_eos,
        temperature=args.temperature,
        seed=args.seed,
        timeout=args.timeout,
    )
    return [
        (
            replace(plain, prompts=_generated(args, args.warmup, 2 * turn + 1)),
            replace(
                plain,
                prompts=prompts or _generated(args, args.num_prompts, 2 * turn),
                max_concurrency=concurrency,
                request_rate=args.request_rate,
            ),
        )
        for turn, concurrency in enumerate(args.max_concurrency or (None,))
    ]


def _generated(args: argparse.Namespace, num: int, turn: int) -> tuple[str, ...]:
    """Prompts that no other turn has, but for the prefix that all share."""
    (prefix,) = make_prompts(1, args.prefix_len, args.seed)
    own = make_prompts(num, args.input_len, args.seed + turn * OTHER_SEED)
    return tuple(f"{prefix} {prompt}" for prompt in own) if prefix else own


def _prompts_of(path: Path | None) -> tuple[str, ...]:
    """Raises CommandError."""
    if path is None:
        return ()
    try:
        prompts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"--prompts {path}: {error}") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise CommandError(f"--prompts {path} must hold a JSON list of strings, and at least one")
    return tuple(prompts)


@contextmanager
def _progress(load: Load, ended: list[Reply]) -> Generator[Callable[[Reply], None], None, None]:
    """-> what to call with each reply, which joins those that have ended. A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    title = None if load.max_concurrency is None else f"{load.max_concurrency} at once"
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(load.prompts), desc=title, unit="req", disable=hidden, dynamic_ncols=True, leave=False) as bar:
        start = time.perf_counter()

        def on_reply(reply: Reply) -> None:
            ended.append(reply)
            rate = sum(each.output_tokens for each in ended) / (time.perf_counter() - start)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            bar.update()

        yield on_reply


def report(
    args: argparse.Namespace, results: Sequence[dict[str, Any]], show: Callable[[dict[str, Any]], str] = table
) -> int:
    """Prints and writes the results; the exit code. show: the table of a single one."""
    written = json.dumps(results if len(results) > 1 else results[0], indent=1)
    if args.output is not None:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(written + "\n")
        except OSError as error:
            print(f"jaxserve bench: error: --output {args.output}: {error.strerror}", file=sys.stderr)
            return 2
    if args.json:
        print(written)
    elif len(results) > 1:
        print(comparison(results))
    else:
        print(show(results[0]))
    return 1 if any(result["failed"] for result in results) else 0
