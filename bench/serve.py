"""`jaxserve bench`, and a replay of the server's own steps beside it.

python -m bench.serve --base-url http://127.0.0.1:30000 --num-prompts 64 --max-concurrency 16
python -m bench.serve --request-rate 4 --num-prompts 100 --output bench/results/serve.json
python -m bench.serve --against-replay --max-concurrency 16 --server-args="--dtype float32"

--against-replay starts a server itself, records the plans of its steps, and launches the very same plans again without
a server (bench.replay): what of the device's tokens/s reaches a client. All else is jaxserve.terminal.bench.
"""

import argparse
import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxserve.child import ENVIRONMENT
from jaxserve.terminal import bench
from jaxserve.terminal.figures import summarise, table
from jaxserve.terminal.http import Server
from jaxserve.terminal.load import run
from jaxserve.utils import launch_server_cmd, terminate_process, wait_for_server

ROOT = Path(__file__).parents[1]


def _against_replay(args: argparse.Namespace) -> dict[str, Any]:
    """A recorded run over HTTP, this process being the load generator, then the replay in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        plans = str(Path(folder) / "plans.npz")
        # What the server says goes to where the table does not.
        command = f"python -m jaxserve --record-plans {shlex.quote(plans)} {args.server_args}"
        process, port = launch_server_cmd(command)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_server(url, process=process)
            server = Server(url, args.api_key)
            model = args.model or server.get("/v1/models")["data"][0]["id"]
            ((warmup, load),) = bench.loads(args, server, model)
            asyncio.run(run(warmup))
            start = time.monotonic()
            replies, seconds = asyncio.run(run(load))
            end = time.monotonic()
        finally:
            terminate_process(process)  # it writes the plans, then ends
        replay = [sys.executable, "-m", "bench.replay", plans, "--start", str(start), "--end", str(end)]
        replayed = subprocess.run(
            replay, cwd=ROOT, env=ENVIRONMENT | os.environ, stdout=subprocess.PIPE, check=True, text=True
        )
    return summarise(load, replies, seconds) | {"replay": json.loads(replayed.stdout)}


def _replay_table(result: dict[str, Any]) -> str:
    replay, tokens = result["replay"], result["total_output_tokens"]
    served, alone = tokens / replay["recorded_seconds"], tokens / replay["replayed_seconds"]
    lines = [
        ("steps (with prefill)", f"{replay['steps']} ({replay['prefill_steps']})"),
        ("tokens/s over HTTP", f"{served:.1f}"),
        ("tokens/s of the replay", f"{alone:.1f}"),
        ("HTTP / replay", f"{replay['ratio']:.1%}"),
        ("different tokens", f"{replay['different_tokens']}"),
    ]
    return "\n".join([table(result), "", *(f"{name:<24}{value:>20}" for name, value in lines)])


def main() -> int:
    parser = bench.arguments("python -m bench.serve")
    parser.add_argument("--against-replay", action="store_true", help="start a server, then replay its very steps")
    parser.add_argument("--server-args", default="", help="flags of that server, in one quoted string")
    args, flags = parser.parse_known_args()
    if not args.against_replay:
        return bench.main(sys.argv[1:])
    if flags or len(args.max_concurrency or ()) > 1:
        parser.error("--against-replay takes one --max-concurrency, and the server's flags in --server-args")
    try:
        result = _against_replay(args)
    except subprocess.CalledProcessError as error:
        print(f"the replay failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return bench.report(args, [result], _replay_table)


if __name__ == "__main__":
    sys.exit(main())
