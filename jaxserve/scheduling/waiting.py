"""Requests that hold no slot: new ones and those that were preempted, per priority."""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice

from jaxserve.scheduling.sequence import Sequence, order


class _Lane:
    """The waiting sequences of one priority; both collections in order of arrival."""

    def __init__(self) -> None:
        self.returning: list[Sequence] = []
        self.new: OrderedDict[int, Sequence] = OrderedDict()


class WaitingQueue:
    """Preempted sequences before new ones, smaller priorities before larger ones."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}
        self._num_sequences = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self.priorities():
            yield from self._lanes[priority].returning
            yield from self._lanes[priority].new.values()

    def priorities(self) -> list[int]:
        """Those with anyone waiting, smallest first."""
        return sorted(self._lanes)

    def add(self, sequence: Sequence) -> None:
        """Enter behind all of the same kind; a sequence that ran before enters among the returning, by arrival."""
        lane = self._lanes.setdefault(sequence.order[0], _Lane())
        if sequence.was_admitted:
            insort(lane.returning, sequence, key=order)
        else:
            lane.new[sequence.order[1]] = sequence
        self._num_sequences += 1

    def remove(self, sequence: Sequence) -> None:
        lane = self._lanes[sequence.order[0]]
        if sequence.was_admitted:
            lane.returning.remove(sequence)
        else:
            del lane.new[sequence.order[1]]
        if not lane.returning and not lane.new:
            del self._lanes[sequence.order[0]]
        self._num_sequences -= 1

    def returning(self, priority: int) -> list[Sequence]:
        """Preempted sequences of this priority in order of arrival (a copy)."""
        lane = self._lanes.get(priority)
        return list(lane.returning) if lane else []

    def oldest(self, priority: int, count: int) -> list[Sequence]:
        """The first count new sequences of this priority."""
        lane = self._lanes.get(priority)
        return list(islice(lane.new.values(), count)) if lane else []

    def fills_less(self, priority: int, count: int, tokens: int) -> bool:
        """True when the first count new sequences have fewer prompt tokens than that, and more wait behind them."""
        window = self.oldest(priority, count + 1)
        return len(window) > count and sum(sequence.num_prompt for sequence in window[:count]) < tokens


def longest_match_order(
    window: list[Sequence], num_matched: Callable[[Sequence], int], impatient_before: float
) -> list[Sequence]:
    """window by longest cached prefix; those that arrived before impatient_before come first, in order of arrival."""

    def rank(sequence: Sequence) -> tuple[int, int]:
        return (0, 0) if sequence.arrived <= impatient_before else (1, -num_matched(sequence))

    return sorted(window, key=rank)  # stable: equals stay in order of arrival
