"""Whose turn it is where prefills and decodes do not share a step."""

from jaxserve.scheduling.picked import Picked

BATCH_PATIENCE = 3  # decode steps of interactive rows between two prefills of batch work: most gaps stay what they are


class Turns:
    """Prefills and decodes alternate, except that interactive requests (priority <= 0) do not wait for batch work."""

    def __init__(self) -> None:
        self._num_decodes = 1  # since the last prefill
        self._was_batch = False  # that prefill: of batch work only

    def prefill_first(self, *, prompt_waits: bool, row_waits: bool) -> bool:
        """Whether the next step is to be a prefill, if there is one to do.

        prompt_waits, row_waits: somebody interactive waits for a prefill, for the next token.
        """
        if prompt_waits:
            return self._num_decodes > 0 or self._was_batch or not row_waits
        return self._num_decodes >= (BATCH_PATIENCE if row_waits else 1)

    def took(self, picked: Picked) -> None:
        """A step was planned."""
        if picked.chunks:
            self._num_decodes, self._was_batch = 0, all(sequence.order[0] > 0 for sequence, _ in picked.chunks)
        else:
            self._num_decodes += 1
