"""Whose turn it is where prefills and decodes do not share a step."""

from collections.abc import Iterable
from typing import Literal

from jaxserve.scheduling.sequence import Sequence

Turn = Literal["mixed", "decode", "prefill"]

BATCH_PATIENCE = 3  # decode steps of interactive rows between two prefills of batch work: most gaps stay what they are


class Turns:
    """Prefills and decodes alternate, except that interactive requests (priority <= 0) do not wait for batch work."""

    def __init__(self) -> None:
        self._num_decodes = 1  # since the last prefill
        self._was_batch = False  # that prefill: of batch work only

    def order(self, mixed: bool, interactive: tuple[bool, bool]) -> tuple[Turn, ...]:
        """The kinds of step to try, in order. interactive: somebody waits for a prefill, for the next token."""
        if mixed:
            return ("mixed",)
        return ("prefill", "decode") if self._prefill_first(*interactive) else ("decode", "prefill")

    def _prefill_first(self, prompt_waits: bool, row_waits: bool) -> bool:
        if prompt_waits:
            return self._num_decodes > 0 or self._was_batch or not row_waits
        return self._num_decodes >= (BATCH_PATIENCE if row_waits else 1)

    def took(self, prefilled: Iterable[Sequence]) -> None:
        """A step was planned, which prefills these."""
        priorities = [sequence.order[0] for sequence in prefilled]
        if priorities:
            self._num_decodes, self._was_batch = 0, min(priorities) > 0
        else:
            self._num_decodes += 1
