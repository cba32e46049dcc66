"""From a step's result to the message for the front end."""

from jaxserve.scheduling.plan import StepResult
from jaxserve.scheduling.sequence import Sequence
from jaxserve.types import EngineStats, FinishReason, StepEvents, TokenLogprobs


def token_logprobs(result: StepResult, row: int, n: int, count: int) -> TokenLogprobs:
    """What the device reported for token n of a row, with count alternatives."""
    return TokenLogprobs(
        logprob=float(result.logprobs[row, n]),
        top_ids=tuple(result.top_ids[row, n, :count].tolist()),
        top_logprobs=tuple(result.top_logprobs[row, n, :count].tolist()),
    )


class EventColumns:
    """StepEvents while it grows: one row per token, turned into columns at the end."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int | None, FinishReason | None, int, TokenLogprobs | None]] = []

    def add(
        self, sequence: Sequence, token: int | None, reason: FinishReason | None, logprobs: TokenLogprobs | None
    ) -> None:
        self._rows.append((sequence.request.id, token, reason, sequence.num_cached, logprobs))

    def add_abort(self, request_id: int) -> None:
        """The end of a request that has no sequence."""
        self._rows.append((request_id, None, "abort", 0, None))

    def events(self, stats: EngineStats) -> StepEvents:
        if not self._rows:
            return StepEvents((), (), (), (), (), stats)
        return StepEvents(*zip(*self._rows, strict=True), stats)
