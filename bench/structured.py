"""What structured output costs: streams of which some are constrained by a schema, against the same streams without.

python -m bench.structured --base-url http://127.0.0.1:30000 --streams 16 --constrained 4

Both mixes take turns, --rounds times; a stream's speed is its output tokens after the first, over the time from its
first to its last piece of text. The ratios are of the medians of the same prompts' speeds with and without
constraints, in one run on one server. Every answer is --output-len tokens long.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from jaxserve.terminal.load import Load, Reply, get_json, make_prompts, run

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 40},
            "kind": {"enum": ["person", "place", "thing"]},
            "size": {"type": "integer"},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 3},
        },
        "required": ["name", "kind", "size", "parts"],
        "additionalProperties": False,
    },
    "$defs": {
        "part": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "weight": {"type": "number"}},
            "required": ["name", "weight"],
            "additionalProperties": False,
        }
    },
}


@dataclass(frozen=True)
class Mix:
    """Streams that run together: the first of prompts are constrained, the others are not."""

    load: Load  # all prompts, nothing constrained
    constrained: int

    async def run(self) -> tuple[list[Reply], list[Reply]]:
        """-> replies of the constrained streams, and of the others. Raises ConnectionError where one failed."""
        prompts, extra = self.load.prompts, {"json_schema": SCHEMA}
        bound = replace(self.load, prompts=prompts[: self.constrained], extra=extra)
        free = replace(self.load, prompts=prompts[self.constrained :])
        (some, _), (others, _) = await asyncio.gather(run(bound), run(free))
        failed = [reply.error for reply in (*some, *others) if reply.error]
        if failed:
            raise ConnectionError(failed[0])
        return some, others


def speed(reply: Reply) -> float:
    """Tokens a second after the first."""
    return (reply.output_tokens - 1) / (reply.text_times[-1] - reply.text_times[0])


def speeds(replies: Sequence[Reply]) -> list[float]:
    return [speed(reply) for reply in replies]


async def measure(load: Load, constrained: int, rounds: int) -> dict[str, Any]:
    """-> medians in tokens/s of a stream, and the ratios with / without constraints, of the same prompts."""
    mixed, plain = Mix(load, constrained), Mix(load, 0)
    await mixed.run()  # compiles the grammar, fills the prefix cache
    found: dict[str, list[float]] = {"bound": [], "beside": [], "plain_bound": [], "plain_beside": []}
    for number in range(rounds):
        for mix in (mixed, plain) if number % 2 else (plain, mixed):
            some, others = await mix.run()
            if mix is mixed:
                found["bound"] += speeds(some)
                found["beside"] += speeds(others)
            else:
                found["plain_bound"] += speeds(others[:constrained])
                found["plain_beside"] += speeds(others[constrained:])
    middle = {name: median(values) for name, values in found.items() if values}
    return {
        "streams": len(load.prompts),
        "constrained": constrained,
        "rounds": rounds,
        "output_len": load.output_len,
        "tokens_per_second": middle,
        "ratio_constrained": middle["bound"] / middle["plain_bound"],
        "ratio_unconstrained": middle["beside"] / middle["plain_beside"] if "beside" in middle else None,
    }


def table(result: dict[str, Any]) -> str:
    shown = result["tokens_per_second"]
    lines = [f"{result['streams']} streams, {result['constrained']} of them constrained; tokens/s of a stream, median"]
    lines.append(f"{'':<24}{'without':>10}{'with':>10}{'ratio':>10}")
    for name, key, ratio in (
        ("beside", "beside", "ratio_unconstrained"),
        ("constrained", "bound", "ratio_constrained"),
    ):
        if result[ratio] is not None:
            lines.append(f"{name:<24}{shown['plain_' + key]:>10.2f}{shown[key]:>10.2f}{result[ratio]:>10.1%}")
    return "\n".join(lines)


async def _main(args: argparse.Namespace) -> dict[str, Any]:
    listed = await get_json(args.base_url.rstrip("/") + "/v1/models", args.api_key)
    load = Load(
        base_url=args.base_url,
        model=listed["data"][0]["id"],
        prompts=make_prompts(args.streams, args.input_len, args.seed),
        output_len=args.output_len,
        api_key=args.api_key,
        temperature=args.temperature,
    )
    return await measure(load, args.constrained, args.rounds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="without /v1")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--constrained", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-len", type=int, default=64, help="words of a prompt, about a token each")
    parser.add_argument("--output-len", type=int, default=96, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    if not 1 <= args.constrained <= args.streams:
        parser.error(f"--constrained {args.constrained} is not allowed; give 1 to {args.streams}")
    try:
        result = asyncio.run(_main(args))
    except OSError as error:
        print(f"{args.base_url}: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
