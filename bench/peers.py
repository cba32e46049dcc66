"""The same requests, in one run, through jaxserve and its peers; prints tokens per second and ratios.

python -m bench.peers --torch-python ~/torch/bin/python --torch-model ~/models/SmolLM2-135M-Instruct
python -m bench.peers --peer llama.cpp=http://127.0.0.1:8080 --streams 1 16

Peers: transformers' own generation in float32 (--torch-python: an environment with torch and transformers; batches of
the number of streams, padded on the left, which is its best batched mode), and any OpenAI server (--peer NAME=URL).
They take turns on the machine, round by round, so that a noisy neighbour hits all of them; each shown figure is the
best of its rounds. A server given by --peer keeps its memory but is idle while the others run.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxserve.terminal.load import make_prompts
from jaxserve.utils import launch_server_cmd, terminate_process, wait_for_server

RESULTS = Path(__file__).with_name("results")
Figures = dict[int, dict[str, Any]]  # streams -> {"output_throughput": tokens/s, …}


def prompts_of(streams: int, args: argparse.Namespace, round_number: int) -> tuple[str, ...]:
    """New text for each number of streams and each round: no prefix cache may answer for an earlier one."""
    seed = args.seed + 10_007 * round_number + 101 * streams
    return make_prompts(max(streams, args.requests_per_stream * streams), args.input_len, seed)


def through_server(url: str, args: argparse.Namespace, round_number: int) -> Figures:
    """Measures an OpenAI server with bench.serve in its own process. Raises RuntimeError when a request failed."""
    figures: Figures = {}
    for streams in args.streams:
        with tempfile.TemporaryDirectory() as folder:
            prompts, result = Path(folder, "prompts.json"), Path(folder, "result.json")
            prompts.write_text(json.dumps(prompts_of(streams, args, round_number)))
            command = [sys.executable, "-m", "bench.serve", "--base-url", url, "--prompts", str(prompts)]
            command += [
                "--max-concurrency",
                str(streams),
                "--warmup",
                str(streams),
                "--seed",
                str(args.seed + round_number),
            ]
            command += [
                "--input-len",
                str(args.input_len),
                "--output-len",
                str(args.output_len),
                "--output",
                str(result),
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
            if done.returncode:
                raise RuntimeError(
                    f"load on {url} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}"
                )
            figures[streams] = json.loads(result.read_text())
    return figures


def through_torch(args: argparse.Namespace, round_number: int) -> Figures:
    """Measures transformers in --torch-python. Raises RuntimeError with its last lines when it fails."""
    job = {
        "model": str(args.torch_model),
        "output_len": args.output_len,
        "threads": args.torch_threads,
        "warmup": make_prompts(max(args.streams), args.input_len, args.seed + 1_000_003),
        "runs": [{"streams": n, "prompts": prompts_of(n, args, round_number)} for n in args.streams],
    }
    # -P: the modules beside the script are not to be found in the place of others of their names (kernels).
    command = [args.torch_python, "-P", str(Path(__file__).with_name("torch_generate.py"))]
    done = subprocess.run(command, check=False, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    figures: Figures = {}
    for run in json.loads(done.stdout.splitlines()[-1]):
        rate = run["output_tokens"] / run["seconds"]
        totals = {"total_input_tokens": run["input_tokens"], "total_output_tokens": run["output_tokens"]}
        figures[run["streams"]] = {"output_throughput": rate, "duration": run["seconds"], **totals}
    return figures


def measure(args: argparse.Namespace) -> dict[str, list[Figures]]:
    """-> figures by name, one entry a round; jaxserve first."""
    rounds: dict[str, list[Figures]] = {"jaxserve": []}
    for number in range(args.rounds):
        rounds["jaxserve"].append(through_jaxserve(args, number))
        if args.torch_python:
            rounds.setdefault("transformers", []).append(through_torch(args, number))
        for name, url in args.peer:
            rounds.setdefault(name, []).append(through_server(url, args, number))
        print(f"round {number + 1}/{args.rounds} done", file=sys.stderr, flush=True)
    return rounds


def through_jaxserve(args: argparse.Namespace, round_number: int) -> Figures:
    """A server of our own, ended before the peers run, unless --jaxserve-url names one."""
    if args.jaxserve_url:
        return through_server(args.jaxserve_url, args, round_number)
    process, port = launch_server_cmd(f"python -m jaxserve {args.jaxserve_flags}")
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url, timeout=args.start_timeout, process=process)
        return through_server(url, args, round_number)
    finally:
        terminate_process(process)


def best(rounds: list[Figures], streams: int) -> float:
    """-> tokens per second of the best round."""
    return max(figures[streams]["output_throughput"] for figures in rounds)


def table(rounds: dict[str, list[Figures]], streams: list[int]) -> str:
    """-> output tokens per second and jaxserve's ratio to each peer; 80 columns hold four numbers of streams."""
    lines = [f"{'output tokens/s':<16}" + "".join(f"{f'{n} streams':>16}" for n in streams)]
    for name, figures in rounds.items():
        cells = []
        for n in streams:
            ratio = "" if name == "jaxserve" else f" ({best(rounds['jaxserve'], n) / best(figures, n):.2f}x)"
            cells.append(f"{f'{best(figures, n):.1f}{ratio}':>16}")
        lines.append(f"{name[:15]:<16}" + "".join(cells))
    return "\n".join([*lines, "(ratio: jaxserve's tokens/s over the peer's; best of the rounds)"])


def save(rounds: dict[str, list[Figures]], args: argparse.Namespace) -> Path:
    """Writes bench/results/peers-<UTC time>.json -> its path."""
    now = datetime.now(UTC)
    settings = {
        name: getattr(args, name) for name in ("input_len", "output_len", "requests_per_stream", "rounds", "seed")
    }
    content = {
        "date": now.isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()},
        "settings": settings | {"jaxserve_flags": args.jaxserve_flags},
        "best_output_throughput": {
            name: {n: best(figures, n) for n in args.streams} for name, figures in rounds.items()
        },
        "ratio": {
            name: {n: best(rounds["jaxserve"], n) / best(figures, n) for n in args.streams}
            for name, figures in rounds.items()
            if name != "jaxserve"
        },
        "rounds": rounds,
    }
    path = args.output or RESULTS / f"peers-{now:%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _peer(text: str) -> tuple[str, str]:
    name, found, url = text.partition("=")
    if not found or not name or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL; give one like llama.cpp=http://127.0.0.1:8080")
    if name in ("jaxserve", "transformers"):
        raise argparse.ArgumentTypeError(f"the name {name!r} is taken; choose another")
    return name, url


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=94, help="words of a prompt, about a token each")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jaxserve-url", help="a running server; default: one is started for each round")
    parser.add_argument(
        "--jaxserve-flags", default="", help='flags of the server that is started, as in "--dtype float32"'
    )
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds it may take to be ready")
    parser.add_argument("--torch-python", help="interpreter that has torch and transformers")
    parser.add_argument("--torch-model", help="folder or hub name of the same model")
    parser.add_argument("--torch-threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--output", type=Path, help="default: bench/results/peers-<time>.json")
    return parser


def main() -> int:
    parser = _arguments()
    args = parser.parse_args()
    if bool(args.torch_python) != bool(args.torch_model):
        parser.error("--torch-python and --torch-model go together: give both or neither")
    if min([*args.streams, args.requests_per_stream, args.rounds, args.input_len, args.output_len]) < 1:
        parser.error("--streams, --requests-per-stream, --rounds, --input-len and --output-len must be 1 or more")
    shlex.split(args.jaxserve_flags)
    rounds = measure(args)
    print(table(rounds, args.streams))
    print(f"written to {save(rounds, args)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
