"""What people who watch cost the engine: the rings that are always kept, as a share of the host's time per step, and
one snapshot, pickled for the pipe. No device, no JAX.

python -m bench.watch [--rows 16 256] [--json FILE]
"""

import argparse
import json
import pickle
import time
from itertools import islice
from pathlib import Path

import numpy as np

from bench.schedule import Workload, fake_result
from jaxserve.engine.history import History
from jaxserve.scheduling.scheduler import Scheduler

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
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
