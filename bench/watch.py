"""What people who watch cost the engine: the rings that are always kept, as a share of the host's time per step, and
one snapshot, pickled for the pipe. No device, no JAX. With --base-url, what a page that watches takes from the streams
of a running server: rounds with and without it take turns, and the ratio is of the medians.

python -m bench.watch [--rows 16 256] [--json FILE]
python -m bench.watch --base-url http://127.0.0.1:30000 [--streams 16] [--rounds 3] [--json FILE]
"""

import argparse
import asyncio
import json
import pickle
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.schedule import Workload, fake_result
from jaxserve.engine.history import History
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.terminal.load import Load, get_json, make_prompts, run

SNAPSHOTS = 50


def measure(load: Workload) -> dict[str, float]:
    """Microseconds: of a step's schedule and commit, of what History adds to them; milliseconds of a snapshot."""
    scheduler, requests, history = Scheduler(load.config()), load.requests(), History()
    steps: list[float] = []
    kept: list[float] = []
    pending = None
    for _ in range(3 * load.output):
        stats = scheduler.stats()
        for request in islice(requests, load.rows + 200 - stats.num_running - stats.num_waiting):
            history.arrived(request.id, request.priority, 0.0)
            scheduler.add(request, 0.0)
        result = fake_result(pending) if pending else None
        start = time.perf_counter()
        plan = scheduler.schedule(0.0)
        events = scheduler.commit(pending, result) if pending is not None and result is not None else None
        middle = time.perf_counter()
        if plan is not None:
            history.planned(plan, 0.0)
        if pending is not None and events is not None:
            history.committed(pending, events, 0.0)
        steps.append(middle - start)
        kept.append(time.perf_counter() - middle)
        pending = plan
    times, size = [], 0
    for _ in range(SNAPSHOTS):
        start = time.perf_counter()
        message = pickle.dumps(history.snapshot(*scheduler.snapshot(), scheduler.stats(), 0.0))
        times.append(time.perf_counter() - start)
        size = len(message)
    step, ring = float(np.mean(steps)) * 1e6, float(np.mean(kept)) * 1e6
    return {
        "rows": load.rows,
        "pages": load.config().num_pages - 1,
        "step_us": round(step, 1),
        "history_us": round(ring, 2),
        "history_share": round(ring / step, 4),
        "snapshot_ms": round(float(np.median(times)) * 1e3, 2),
        "snapshot_bytes": size,
    }


@contextmanager
def watched(base_url: str) -> Iterator[list[int]]:
    """Reads the engine's state as the page does; -> the sizes of its events."""
    sizes: list[int] = []
    reply = urllib.request.urlopen(base_url + "/v1/engine?stream=true&interval_ms=500", timeout=60)

    def read() -> None:
        try:
            sizes.extend(len(line) for line in reply if line.startswith(b"data"))
        except (OSError, ValueError, AttributeError):  # closed under its hands
            return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield sizes
    reply.fp.raw._sock.shutdown(2)
    thread.join(10)


async def measure_streams(base_url: str, streams: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of all streams together, with and without somebody who watches."""
    model = (await get_json(base_url + "/v1/models"))["data"][0]["id"]
    load = Load(base_url, model, make_prompts(streams, 64, 0), output_len=96)

    async def rate() -> float:
        replies, seconds = await run(load)
        failed = [reply.error for reply in replies if reply.error]
        if failed:
            raise ConnectionError(failed[0])
        return sum(reply.output_tokens for reply in replies) / seconds

    await rate()  # fills the prefix cache
    plain, seen = [], []
    for number in range(rounds):
        for watching in (False, True) if number % 2 else (True, False):
            if watching:
                with watched(base_url) as sizes:
                    seen.append(await rate())
            else:
                plain.append(await rate())
    return {
        "streams": streams,
        "tokens_per_second": {"plain": plain, "watched": seen},
        "ratio": median(seen) / median(plain),
        "event_bytes": median(sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--base-url", help="of a server, without /v1; measures its streams instead")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.base_url:
        found = asyncio.run(measure_streams(args.base_url.rstrip("/"), args.streams, args.rounds))
        print(f"{found['streams']} streams, watched against not: {found['ratio']:.1%} of the tokens a second")
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    results = [measure(Workload(rows, 16, 512, 256, churn=True)) for rows in args.rows]
    results.append(measure(Workload(256, 16, 2048, 256, churn=True)))
    for found in results:
        print(
            f"{found['rows']:4.0f} rows, {found['pages']:6.0f} pages: a step's host time {found['step_us']:7.1f} us, "
            f"the rings {found['history_us']:5.2f} us more ({found['history_share']:.1%}); "
            f"a snapshot {found['snapshot_ms']:.2f} ms, {found['snapshot_bytes'] / 1024:.0f} KiB"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
