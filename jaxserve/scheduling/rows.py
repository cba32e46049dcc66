"""Per-slot rows that live as long as a sequence runs, gathered into a StepPlan with one take per array."""

from collections.abc import Sequence as Rows

import numpy as np

from jaxserve.scheduling.buckets import SchedulerConfig
from jaxserve.scheduling.pages import PagePool
from jaxserve.scheduling.plan import (
    GRAMMAR,
    SUPPRESS_STOP,
    TAKE_LAST,
    Bucket,
    PlanArrays,
    StepPlan,
    packed_size,
    unpack,
)
from jaxserve.scheduling.sequence import NUM_SAMPLING_WORDS, Sequence, sampling_words

Chunk = tuple[Sequence, int]  # a sequence and how many of its tokens are prefilled in this step

_TOP_P = PlanArrays._fields.index("top_p") - PlanArrays._fields.index("flags")
_REPETITION = PlanArrays._fields.index("repetition_penalty") - PlanArrays._fields.index("flags")


class RowTable:
    """Page table and sampling words by slot; row max_running is the padding row and stays as it is made here."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._pages = np.zeros((config.max_running + 1, config.max_pages), np.int32)
        self._words = np.zeros((NUM_SAMPLING_WORDS, config.max_running + 1), np.int32)
        one = int(np.float32(1).view(np.int32))  # padding rows divide by nothing that is 0
        self._words[[_TOP_P, _REPETITION], config.max_running] = one

    def assign(self, sequence: Sequence, num_pages: int) -> None:
        """sequence got its slot; its first num_pages pages hold computed tokens."""
        self._words[:, sequence.slot] = sampling_words(sequence.request.params)
        if sequence.matcher is not None:
            self._words[0, sequence.slot] |= GRAMMAR
        self.show_pages(sequence, 0, num_pages)

    def show_pages(self, sequence: Sequence, start: int, stop: int) -> None:
        """Pages start .. stop of sequence are part of its row from now on."""
        self._pages[sequence.slot, start:stop] = sequence.pages[start:stop]

    def clear(self, sequence: Sequence) -> None:
        """sequence is about to lose its slot."""
        self._pages[sequence.slot, : len(sequence.pages)] = 0

    def write(self, decode: Rows[Sequence], chunks: Rows[Chunk], bucket: Bucket) -> StepPlan:
        """One token for each of decode and the given number for each chunk, which the bucket has room for; moves
        num_computed and num_in_flight."""
        config = self._config
        packed = np.zeros(packed_size(bucket, config.max_pages), np.int32)
        arrays = unpack(packed, bucket, config.max_pages)
        slots = np.full(bucket.num_rows, config.max_running, np.int64)
        unflagged: list[int] = []  # rows that sample nothing
        suppressed: list[int] = []
        self._write_decode(arrays, decode, slots, suppressed)
        self._write_chunks(arrays, chunks, bucket.num_decode, slots, suppressed, unflagged)
        arrays.slots[:] = slots
        np.take(self._pages, slots, axis=0, out=arrays.page_table, mode="clip")
        words = packed[packed.size - NUM_SAMPLING_WORDS * bucket.num_rows :].reshape(NUM_SAMPLING_WORDS, -1)
        np.take(self._words, slots, axis=1, out=words, mode="clip")
        if suppressed:
            arrays.flags[suppressed] |= SUPPRESS_STOP
        if unflagged:
            arrays.flags[unflagged] = 0
        num_prefill = sum(count for _, count in chunks)
        return StepPlan(
            bucket=bucket,
            packed=packed,
            arrays=arrays,
            admissions=(),
            sequences=tuple(enumerate(decode))
            + tuple((bucket.num_decode + row, sequence) for row, (sequence, _) in enumerate(chunks)),
            num_tokens=len(decode) + num_prefill,
            num_decode_rows=len(decode),
            num_new_tokens=num_prefill,
        )

    def _write_decode(
        self, arrays: PlanArrays, decode: Rows[Sequence], slots: np.ndarray, suppressed: list[int]
    ) -> None:
        count = len(decode)
        if not count:
            return
        slots[:count] = [sequence.slot for sequence in decode]
        arrays.positions[:count] = [sequence.num_computed for sequence in decode]
        arrays.token_ids[:count] = [TAKE_LAST if s.num_in_flight else s.tokens[-1] for s in decode]
        np.add(arrays.positions[:count], 1, out=arrays.kv_lens[:count])
        suppressed += [row for row, s in enumerate(decode) if s.min_length and s.length < s.min_length]
        for sequence in decode:
            sequence.num_computed += 1
            sequence.num_in_flight += 1

    def _write_chunks(
        self,
        arrays: PlanArrays,
        chunks: Rows[Chunk],
        num_decode: int,
        slots: np.ndarray,
        suppressed: list[int],
        unflagged: list[int],
    ) -> None:
        page_size, end = self._config.page_size, len(arrays.token_ids) - num_decode
        start, starts = 0, []
        for row, (sequence, count) in enumerate(chunks, num_decode):
            first = sequence.num_computed
            stop = first + count
            self.show_pages(sequence, first // page_size, -(-stop // page_size))
            starts.append(start)
            at = num_decode + start
            arrays.token_ids[at : at + count] = sequence.tokens[first:stop]
            # Positions run on through the padding, up to the next chunk: those past kv_len write nothing.
            start += -(-count // page_size) * page_size
            span = (start if len(starts) < len(chunks) else end) - starts[-1]
            arrays.positions[at : at + span] = np.arange(first, first + span)
            slots[row] = sequence.slot
            arrays.kv_lens[row] = sequence.num_computed = stop
            if sequence.is_prefilling or not sequence.answers:
                unflagged.append(row)
            elif sequence.length < sequence.min_length:
                suppressed.append(row)
            if not sequence.is_prefilling:  # its token is in flight, or its end
                sequence.num_in_flight += 1
        arrays.chunk_starts[:] = end
        arrays.chunk_starts[: len(starts)] = starts

    def check_invariants(self, running: Rows[Sequence], free_slots: Rows[int], pool: PagePool) -> None:
        """AssertionError unless the page table shows what the sequences hold, and no page stands in two places."""
        places: dict[int, int] = {}
        for sequence in running:
            shown = -(-sequence.num_computed // self._config.page_size)
            row = self._pages[sequence.slot].tolist()
            assert row[:shown] == sequence.pages[:shown] and not any(row[len(sequence.pages) :])
            for place, page in enumerate(sequence.pages):
                shared = places.setdefault(page, place) == place and (pool.is_in_tree(page))
                assert shared or [p for s in running for p in s.pages].count(page) == 1, f"page {page} in two tables"
        assert not self._pages[[*free_slots, self._config.max_running]].any()
