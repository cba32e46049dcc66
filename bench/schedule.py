"""Host microseconds per step (schedule + commit, overlapped) at several numbers of decode rows; no device, no JAX.

python -m bench.schedule [--rows 16 64 256] [--page-size 16] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.scheduling.scheduler import Scheduler, SchedulerConfig
from jaxserve.types import Request, SamplingParams


def fake_result(plan: StepPlan) -> StepResult:
    """Token 7 for every row."""
    rows = plan.bucket.num_rows
    return StepResult(
        token_ids=np.full((rows, 1), 7, np.int32),
        num_tokens=np.ones(rows, np.int32),
        logprobs=np.zeros((rows, 1), np.float32),
        top_ids=np.zeros((rows, 1, 20), np.int32),
        top_logprobs=np.zeros((rows, 1, 20), np.float32),
    )


@dataclass(frozen=True)
class Workload:
    """rows sequences run at once. churn: those that end are replaced and 200 more wait, so steps admit, evict and mix
    prefill with decode; otherwise every measured step is pure decode."""

    rows: int
    page_size: int
    prompt: int  # tokens; half of them are the same for all
    output: int  # tokens
    churn: bool

    def config(self) -> SchedulerConfig:
        pages = -(-(self.prompt + self.output) // self.page_size)
        return SchedulerConfig(
            num_pages=1 + self.rows * pages * 5 // 4,
            page_size=self.page_size,
            max_model_len=8192,
            max_running=self.rows,
            decode_buckets=(self.rows,),
            prefill_buckets=((512, 8),),
        )

    def requests(self) -> Iterator[Request]:
        """Without end; the same every time."""
        rng = np.random.default_rng(0)
        prefix = rng.integers(0, 32000, self.prompt // 2).tolist()
        for number in count():
            tokens = (*prefix, *rng.integers(0, 32000, self.prompt - len(prefix)).tolist())
            length = int(rng.integers(self.output // 2, self.output)) if self.churn else self.output
            yield Request(number, tokens, SamplingParams(max_tokens=length, seed=number, temperature=0.8, top_p=0.9))


def measure(load: Workload) -> dict[str, float]:
    """Microseconds of schedule and commit together, per step, and what happened in those steps."""
    scheduler, requests = Scheduler(load.config()), load.requests()
    times: list[float] = []
    pending, prefilling = None, 0
    for turn in range(4 * load.output):
        stats = scheduler.stats()
        wanted = load.rows + 200 - stats.num_running - stats.num_waiting if load.churn else load.rows * (turn == 0)
        for request in islice(requests, wanted):
            scheduler.add(request, 0.0)
        result = fake_result(pending) if pending else None
        start = time.perf_counter()
        plan = scheduler.schedule(0.0)
        if pending is not None and result is not None:
            scheduler.commit(pending, result)
        if plan is not None and (load.churn or plan.num_decode_rows == load.rows):
            times.append(time.perf_counter() - start)
            prefilling += plan.bucket.num_prefill > 0
        pending = plan
    p50, p99 = np.percentile(times, [50, 99]) * 1e6
    stats = scheduler.stats()
    return {
        "rows": load.rows,
        "churn": load.churn,
        "steps": len(times),
        "prefill_steps": prefilling,
        "preemptions": stats.preemptions_total,
        "cached_tokens": stats.cached_tokens_total,
        "p50_us": round(float(p50), 1),
        "p99_us": round(float(p99), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens per prompt; half of them are shared by all")
    parser.add_argument("--output", type=int, default=256, help="tokens per answer")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    results = []
    for rows in args.rows:
        for churn in (False, True):
            result = measure(Workload(rows, args.page_size, args.prompt, args.output, churn))
            results.append(result)
            print(
                f"{rows:4d} rows, {'churn ' if churn else 'decode'}: p50 {result['p50_us']:7.1f} us, "
                f"p99 {result['p99_us']:7.1f} us  ({result['steps']} steps, {result['prefill_steps']} with prefill, "
                f"{result['preemptions']} preemptions)"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
