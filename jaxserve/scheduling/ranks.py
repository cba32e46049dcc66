"""Data parallel: several schedulers, one for each rank of the mesh, which take their steps together.

A rank has rows, slots, pages and a prefix tree of its own, and its requests stay with it. All ranks run one program at
a time, so they share a bucket: the smallest one that has room for the fullest of them.
"""

from collections.abc import Iterable
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.scheduling.buckets import SchedulerConfig, choose_bucket
from jaxserve.scheduling.plan import JointPlan, Plan, StepResult
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.snapshot import joined
from jaxserve.scheduling.turns import Turns
from jaxserve.types import EngineStats, Request, RequestView, StepEvents

if TYPE_CHECKING:
    from jaxserve.scheduling.grammar import Matcher


class RankedScheduler:
    """Stands in for a Scheduler; config is that of each rank."""

    def __init__(self, config: SchedulerConfig, num_ranks: int) -> None:
        self.config = config
        self.ranks = tuple(Scheduler(config) for _ in range(num_ranks))
        self._turns = Turns()

    def add(self, request: Request, now: float, matcher: "Matcher | None" = None) -> None:
        """As Scheduler.add, on the rank that _choose says."""
        if any(rank.knows(request.id) for rank in self.ranks):
            raise ValueError(f"request id {request.id} is in use; ids must be unique until their last event")
        self._choose(request).add(request, now, matcher)

    def _choose(self, request: Request) -> Scheduler:
        """The rank that holds most of the prompt, among those that have at most a quarter of their rows more to do than
        the least busy one; of equals the least busy."""
        fewest = min(rank.num_open for rank in self.ranks)
        near = [rank for rank in self.ranks if rank.num_open <= fewest + self.config.max_running // 4]
        return max(near, key=lambda rank: (rank.num_cached_pages_of(request), -rank.num_open))

    def abort(self, request_ids: Iterable[int], compilations: int = 0, outside: Iterable[int] = ()) -> StepEvents:
        ids = list(request_ids)
        events = [rank.abort(ids, 0, () if i else outside) for i, rank in enumerate(self.ranks)]
        return self._joined(events, compilations)

    def flush_cache(self) -> None:
        for rank in self.ranks:
            rank.flush_cache()

    @property
    def has_work(self) -> bool:
        return any(rank.has_work for rank in self.ranks)

    def schedule(self, now: float) -> JointPlan | None:
        """The next step of all ranks; one that has nothing to do gets a plan of padding."""
        capped = sum(rank.is_capped(now) for rank in self.ranks) > 0
        picked = [rank.begin(capped) for rank in self.ranks]
        for turn in self._turns.order(self.config.mixed, self._interactive()):
            if sum(rank.pick(own, turn, now) for rank, own in zip(self.ranks, picked, strict=True)):
                break
        else:
            return None
        self._turns.took(sequence for own in picked for sequence, _ in own.chunks)
        bucket = choose_bucket(self.config, *map(max, zip(*(own.size for own in picked), strict=True)))
        parts = tuple(rank.plan(own, bucket) for rank, own in zip(self.ranks, picked, strict=True))
        return JointPlan(parts, np.concatenate([part.packed for part in parts]))

    def _interactive(self) -> tuple[bool, bool]:
        prompts, rows = zip(*(rank.interactive for rank in self.ranks), strict=True)
        return any(prompts), any(rows)

    def commit(self, plan: Plan, result: StepResult, compilations: int = 0) -> StepEvents:
        each = zip(self.ranks, plan.parts, result.parts, strict=True)
        return self._joined([rank.commit(part, told) for rank, part, told in each], compilations)

    def constrain(self, plan: Plan, compilations: int = 0) -> tuple[np.ndarray, StepEvents]:
        """As Scheduler.constrain; masks [ranks * (S + R), words]."""
        masks: dict[int, np.ndarray] = {}
        events = []
        for index, (rank, part) in enumerate(zip(self.ranks, plan.parts, strict=True)):
            if part.is_constrained:
                masks[index], ended = rank.constrain(part)
                events.append(ended)
        everything = np.full_like(next(iter(masks.values())), -1)
        joined = np.concatenate([masks.get(index, everything) for index in range(len(self.ranks))])
        return joined, self._joined(events, compilations)

    def stats(self, compilations: int = 0) -> EngineStats:
        """Sums over the ranks; steps are those of all of them together."""
        columns = zip(*(astuple(rank.stats()) for rank in self.ranks), strict=True)
        total = EngineStats(*map(sum, columns))
        return replace(total, steps_total=total.steps_total // len(self.ranks), compilations_total=compilations)

    def snapshot(self) -> tuple[tuple[RequestView, ...], bytes]:
        """As Scheduler.snapshot, of all ranks."""
        return joined((rank.snapshot() for rank in self.ranks), self.config.max_running)

    def check_invariants(self) -> None:
        for rank in self.ranks:
            rank.check_invariants()

    def _joined(self, events: list[StepEvents], compilations: int) -> StepEvents:
        def column(name: str) -> tuple:
            return tuple(value for each in events for value in getattr(each, name))

        names = ("request_ids", "token_ids", "finish_reasons", "cached_tokens", "logprobs")
        return StepEvents(*map(column, names), stats=self.stats(compilations))


def make_scheduler(config: SchedulerConfig, num_ranks: int) -> Scheduler | RankedScheduler:
    """One scheduler for each rank, behind one face."""
    return Scheduler(config) if num_ranks == 1 else RankedScheduler(config, num_ranks)
