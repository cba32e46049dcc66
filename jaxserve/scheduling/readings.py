"""What a prompt tells about itself: its log-probabilities, and its vector.

Both need the hidden states of prompt tokens, which exist in the step that computes these tokens and nowhere else. So
such a prompt takes from the prefix cache only what was read already (Sequence.max_match): nothing at first, and after a
preemption what it had. What a step reads is settled when it is planned, and a planned step always runs; hence every
token is read exactly once, however the prompt is cut into chunks and however often it starts again.
"""

from typing import NamedTuple

import numpy as np

from jaxserve.scheduling.plan import Readings, StepPlan, StepResult
from jaxserve.scheduling.sequence import Sequence
from jaxserve.types import Embedded, PromptLogprobs, TokenLogprobs


class Owner(NamedTuple):
    """Positions first .. stop of a sequence, read in one step."""

    sequence: Sequence
    first: int
    stop: int


def plan_readings(plan: StepPlan) -> Readings | None:
    """What the chunks of this step must tell, in the order of its rows; moves num_read. None: nothing."""
    owners: list[Owner] = []
    index: list[int] = []
    targets: list[int] = []
    spans: list[tuple[int, int]] = []
    num_top = 0
    for row, sequence in plan.sequences[plan.num_decode_rows :]:
        if sequence.reads is None or sequence.num_read == sequence.num_prompt:
            continue
        start = int(plan.arrays.chunk_starts[row - plan.bucket.num_decode])
        position = int(plan.arrays.positions[plan.bucket.num_decode + start])
        stop = min(int(plan.arrays.kv_lens[row]), sequence.num_prompt)
        first = sequence.num_prompt - 1 if sequence.reads == "last" else sequence.num_read
        if first >= stop:
            continue
        owners.append(Owner(sequence, first, stop))
        sequence.num_read = stop
        at = start + first - position  # of the token at position first
        if sequence.reads == "scores":
            predicted = sequence.tokens[first + 1 : min(stop + 1, sequence.num_prompt)]
            targets += predicted
            index += range(at, at + len(predicted))
            num_top = max(num_top, sequence.request.params.num_prompt_logprobs or 0)
        else:
            spans.append((at, at + stop - first))
    if not owners:
        return None
    arrays = (np.asarray(values, np.int32) for values in (index, targets))
    return Readings(*arrays, num_top, tuple(spans), tuple(owners))


def read_messages(plan: StepPlan, result: StepResult) -> list[PromptLogprobs | Embedded]:
    """What the front end is told of a step's readings, before the step's tokens; ended sequences are left out."""
    messages: list[PromptLogprobs | Embedded] = []
    if plan.readings is None:
        return messages
    assert result.read is not None
    num_scores = num_spans = 0
    for sequence, first, stop in plan.readings.owners:
        if sequence.reads == "scores":
            count = min(stop, sequence.num_prompt - 1) - first
            if not sequence.done and (count or first == 0):
                messages.append(_scores(sequence, first, result, num_scores, count))
            num_scores += count
            continue
        total = result.read.sums[num_spans].astype(np.float64)
        num_spans += 1
        sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
        if stop == sequence.num_prompt and not sequence.done:
            messages.append(Embedded(sequence.request.id, _unit(sequence.pooled).tobytes()))
    return messages


def _scores(sequence: Sequence, first: int, result: StepResult, start: int, count: int) -> PromptLogprobs:
    """count scores from start on, of the tokens behind position first; the first token of all has none."""
    read, wanted = result.read, sequence.request.params.num_prompt_logprobs
    assert read is not None
    scored = slice(start, start + count)
    columns = (
        read.logprobs[scored].tolist(),
        map(tuple, read.top_ids[scored, :wanted].tolist()),
        map(tuple, read.top_logprobs[scored, :wanted].tolist()),
        read.ranks[scored].tolist(),
    )
    logprobs: list[TokenLogprobs | None] = [TokenLogprobs(*values) for values in zip(*columns, strict=True)]
    if first == 0:
        return PromptLogprobs(sequence.request.id, 0, (None, *logprobs))
    return PromptLogprobs(sequence.request.id, first + 1, tuple(logprobs))


def _unit(total: np.ndarray) -> np.ndarray:
    """[E] -> float32 of length 1 (a mean and its sum have the same direction); zeros stay zeros."""
    length = np.linalg.norm(total)
    return (total / length if length > 0 else total).astype(np.float32)
