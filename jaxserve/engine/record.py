"""Every launched plan, kept and written to a file: a debugging aid, which bench.replay runs again without a server."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.loop import Pending, Runner
from jaxserve.scheduling.plan import (
    GRAMMAR,
    Admission,
    Bucket,
    Plan,
    PlanArrays,
    StepPlan,
    StepResult,
    packed_size,
    unpack,
)


class RecordingRunner:
    """Stands in for a runner; clock in seconds, the same for every process of this machine."""

    def __init__(self, runner: Runner, config: EngineConfig, clock: Callable[[], float] = time.monotonic):
        self._runner = runner
        self._config = config
        self._clock = clock
        self._launched: list[tuple[StepPlan, float]] = []
        self._read: list[tuple[np.ndarray, float]] = []
        self._masks: list[tuple[int, int, np.ndarray]] = []  # step, row, words

    def launch(self, plan: Plan) -> "RecordedHandle":
        (plan,) = plan.parts  # several ranks are not recorded
        # sequences are left out: they change, and hold every token of their request.
        self._launched.append((replace(plan, sequences=(), readings=None), self._clock()))
        rows, step = np.flatnonzero(plan.arrays.flags & GRAMMAR), len(self._launched) - 1

        def on_masks(masks: np.ndarray) -> None:
            self._masks += [(step, int(row), masks[row].copy()) for row in rows]

        return RecordedHandle(self._runner.launch(plan), on_masks, self._on_result)

    def _on_result(self, result: StepResult) -> None:
        self._read.append((result.token_ids, self._clock()))

    def save(self, path: str) -> None:
        """Write the steps that were launched and read, in that order, as npz. Raises OSError."""
        count = len(self._read)
        plans = [plan for plan, _ in self._launched[:count]]
        numbers = [astuple(plan.bucket) for plan in plans]
        admissions = [[asdict(admission) for admission in plan.admissions] for plan in plans]
        masks = [each for each in self._masks if each[0] < count]
        with open(path, "wb") as file:  # np.savez would add .npz to a name
            np.savez(
                file,
                config=np.array(json.dumps(asdict(replace(self._config, record_plans=None, cluster=None)))),
                buckets=np.asarray(numbers, np.int32).reshape(count, 3),
                packed=np.concatenate([np.zeros(0, np.int32), *(plan.packed for plan in plans)]),
                max_pages=np.array(plans[0].arrays.page_table.shape[1] if plans else 0),
                admissions=np.array(json.dumps(admissions)),
                launched=np.array([at for _, at in self._launched[:count]]),
                read=np.array([at for _, at in self._read]),
                token_ids=np.concatenate([np.zeros(0, np.int32), *(ids.ravel() for ids, _ in self._read)]),
                mask_places=np.array([each[:2] for each in masks], np.int32).reshape(len(masks), 2),
                mask_words=np.stack([words for _, _, words in masks]) if masks else np.zeros((0, 0), np.int32),
            )


class RecordedHandle:
    """A step in flight whose end is noted."""

    def __init__(
        self, handle: Pending, on_masks: Callable[[np.ndarray], None], on_result: Callable[[StepResult], None]
    ):
        self._handle = handle
        self._on_masks = on_masks
        self._on_result = on_result

    def sample(self, masks: np.ndarray) -> None:
        self._handle.sample(masks)
        self._on_masks(masks)

    def result(self) -> StepResult:
        result = self._handle.result()
        self._on_result(result)
        return result


@dataclass(frozen=True)
class Recording:
    """What save() wrote. launched and read [steps] in seconds; token_ids, one array per step, [rows * N]; masks of the
    constrained steps, by their number, [rows, words]."""

    config: EngineConfig
    plans: tuple[StepPlan, ...]
    launched: np.ndarray
    read: np.ndarray
    token_ids: tuple[np.ndarray, ...]
    masks: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str) -> "Recording":
        """Raises OSError, or KeyError for another kind of npz."""
        with np.load(path) as stored:
            buckets = [Bucket(*map(int, numbers)) for numbers in stored["buckets"]]
            max_pages, packed, tokens = int(stored["max_pages"]), stored["packed"], stored["token_ids"]
            admissions = json.loads(str(stored["admissions"]))
            ends = np.cumsum([packed_size(bucket, max_pages) for bucket in buckets], dtype=np.int64)
            vectors = np.split(packed, ends[:-1])
            rows = np.cumsum([bucket.num_rows for bucket in buckets], dtype=np.int64)
            width = len(tokens) // int(rows[-1]) if len(rows) else 1
            plans = tuple(
                _plan(bucket, unpack(vector, bucket, max_pages), vector, given)
                for bucket, vector, given in zip(buckets, vectors, admissions, strict=False)
            )
            return cls(
                config=EngineConfig(**json.loads(str(stored["config"]))),
                plans=plans,
                launched=stored["launched"],
                read=stored["read"],
                token_ids=tuple(np.split(tokens, rows[:-1] * width)) if plans else (),
                masks=_masks(plans, stored["mask_places"], stored["mask_words"]),
            )


def _masks(plans: Sequence[StepPlan], places: np.ndarray, words: np.ndarray) -> dict[int, np.ndarray]:
    masks: dict[int, np.ndarray] = {}
    for (step, row), each in zip(places.tolist(), words, strict=True):
        whole = np.full((plans[step].bucket.num_rows, len(each)), -1, np.int32)
        masks.setdefault(step, whole)[row] = each
    return masks


def _plan(bucket: Bucket, arrays: PlanArrays, packed: np.ndarray, given: list[dict]) -> StepPlan:
    num_tokens = int((arrays.kv_lens > 0)[: bucket.num_decode].sum())
    return StepPlan(bucket, packed, arrays, tuple(map(_admission, given)), (), num_tokens)


def _admission(said: dict) -> Admission:
    return Admission(
        slot=said["slot"],
        token_ids=tuple(said["token_ids"]),
        num_prompt=said["num_prompt"],
        logit_bias=tuple((token, value) for token, value in said["logit_bias"]),
        stop_token_ids=tuple(said["stop_token_ids"]),
    )
