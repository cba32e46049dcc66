"""The choice of one turn while it grows."""

from jaxserve.scheduling.buckets import SchedulerConfig, choose_bucket
from jaxserve.scheduling.plan import Admission
from jaxserve.scheduling.rows import Chunk
from jaxserve.scheduling.sequence import Sequence

Frontier = dict[tuple[object, object], int]  # (node, key of the page being computed below it) -> smallest priority


class Picked:
    """What one turn chose so far, and what room is left in it."""

    def __init__(self, config: SchedulerConfig, frontier: Frontier, capped: bool) -> None:
        self._config = config
        self.decode: list[Sequence] = []
        self.chunks: list[Chunk] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.frontier = frontier
        self.capped = capped  # batch work keeps to its limits
        self.tokens_left = config.chunk_size  # multiples of the page size, both
        self.batch_tokens_left = config.chunk_size
        self.batch_rows_left = config.max_running
        self.page_size = config.page_size
        if capped:
            if config.max_batch_running is not None:
                self.batch_rows_left = config.max_batch_running
            if config.max_batch_prefill_tokens is not None:
                capped_tokens = config.max_batch_prefill_tokens // config.page_size * config.page_size
                self.batch_tokens_left = min(config.chunk_size, capped_tokens)
        self.chunks_left = config.max_chunks

    @property
    def size(self) -> tuple[int, int, int]:
        """Decode rows, prefill tokens (each chunk rounded up to pages) and chunks, as choose_bucket takes them."""
        aligned = sum(-(-count // self.page_size) * self.page_size for _, count in self.chunks)
        return len(self.decode), aligned, len(self.chunks)

    def has_room(self, priority: int) -> bool:
        """For one more chunk."""
        if not self.chunks_left or not self.tokens_left:
            return False
        return priority <= 0 or (self.batch_rows_left > 0 and self.batch_tokens_left > 0)

    def add_chunk(self, sequence: Sequence) -> None:
        """All that is left of the sequence's prefill, or as many whole pages as there is room for."""
        is_batch = sequence.order[0] > 0
        room = min(self.tokens_left, self.batch_tokens_left) if is_batch else self.tokens_left
        count = min(sequence.num_to_prefill - sequence.num_computed, room)
        aligned = -(-count // self.page_size) * self.page_size
        self.chunks.append((sequence, count))
        self.chunks_left -= 1
        self.tokens_left -= aligned
        if is_batch:
            self.batch_rows_left -= 1
            self.batch_tokens_left -= aligned

    def keep_bucket(self) -> None:
        """From here on only what would be padding beside the chunks chosen so far: these do not wait for more."""
        bucket = choose_bucket(self._config, *self.size)
        self.tokens_left = bucket.num_prefill - self.size[1]
        self.chunks_left = bucket.num_chunks - len(self.chunks)

    def drop_preempted(self) -> None:
        """Take back the rows of sequences that lost their slot after they were chosen."""
        if self.preempted:
            self.decode = [sequence for sequence in self.decode if sequence.slot >= 0]
            self.chunks = [chunk for chunk in self.chunks if chunk[0].slot >= 0]

    def admissions(self) -> tuple[Admission, ...]:
        """What the device is told of those that were admitted and have state of their own in their slot."""
        return tuple(s.admission() for s in self.admitted if s.request.params.needs_slot_state)
