"""The plans of a server's run (--record-plans FILE), launched again back to back in this process: what the device alone
takes for the same work.

python -m bench.replay plans.npz [--start SECONDS] [--end SECONDS]

The same runner is built from the same configuration; every plan is launched in the order of the recording, and the
result of step k is read after step k + 1 was launched, as the engine does. The measured window goes from the launch of
the first plan that the recording launched between --start and --end (of the clock of time.monotonic) to the result of
the last, in the recording and in the replay alike.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np

from jaxserve.engine.build import build
from jaxserve.engine.loop import Pending, Runner
from jaxserve.engine.record import Recording
from jaxserve.scheduling.plan import EMIT


@dataclass(frozen=True)
class Replay:
    """seconds of the measured steps, in the server and here; different_tokens: sampled ids that were not the same."""

    steps: int
    prefill_steps: int
    tokens: int  # sampled in these steps, those of rows that had ended included
    recorded_seconds: float
    replayed_seconds: float
    different_tokens: int

    @property
    def ratio(self) -> float:
        """The server's tokens per second as a share of the replay's."""
        return self.replayed_seconds / self.recorded_seconds


def replay(runner: Runner, recording: Recording, measured: range) -> Replay:
    """Launch every plan up to the last measured one; the ones before warm up."""
    overlap = not recording.config.disable_overlap
    seconds: dict[str, float] = {}
    sampled: list[np.ndarray] = []

    def read(index: int, handle: Pending) -> None:
        sampled.append(handle.result().token_ids)
        if index == measured[-1]:
            seconds["end"] = time.monotonic()

    flight: tuple[int, Pending] | None = None
    for index, plan in enumerate(recording.plans[: measured.stop]):
        if flight is not None and (not overlap or index == measured.start):
            read(*flight)
            flight = None
        if index == measured.start:
            seconds["start"] = time.monotonic()
        launched = (index, runner.launch(plan))
        if plan.is_constrained:
            launched[1].sample(recording.masks[index])
        if flight is not None:
            read(*flight)
        flight = launched
    if flight is not None:
        read(*flight)
    emitting = [(recording.plans[i].arrays.flags & EMIT) != 0 for i in range(measured.stop)]
    different = sum(
        int((sampled[i].ravel() != recording.token_ids[i])[np.repeat(emitting[i], sampled[i].shape[1])].sum())
        for i in range(measured.stop)
    )
    plans = recording.plans[measured.start : measured.stop]
    return Replay(
        steps=len(plans),
        prefill_steps=sum(plan.bucket.num_prefill > 0 for plan in plans),
        tokens=sum(int(emitting[i].sum()) for i in measured),
        recorded_seconds=float(recording.read[measured[-1]] - recording.launched[measured.start]),
        replayed_seconds=seconds["end"] - seconds["start"],
        different_tokens=different,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", help="what --record-plans wrote")
    parser.add_argument("--start", type=float, default=float("-inf"), help="seconds; default: the first plan")
    parser.add_argument("--end", type=float, default=float("inf"), help="seconds; default: the last plan")
    args = parser.parse_args()
    recording = Recording.load(args.file)
    inside = [i for i, at in enumerate(recording.launched) if args.start <= at <= args.end]
    if not inside:
        print(f"{args.file} holds no plan in that time; it holds {len(recording.plans)}", file=sys.stderr)
        return 2
    runner = build(recording.config, lambda stage, done, total, message: None).runner
    result = replay(runner, recording, range(inside[0], inside[-1] + 1))
    print(json.dumps(asdict(result) | {"ratio": result.ratio}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
