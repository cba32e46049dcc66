"""What a person who watches is shown of the scheduler's state: counts and pages, never tokens.

A page's state is one uint16:   0        free
                                1        cached: in the prefix tree, held by no sequence
                                2        held by several sequences
                                3 + s    held by the sequence in slot s alone
"""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from itertools import islice

import numpy as np

from jaxserve.scheduling.pages import PagePool
from jaxserve.scheduling.sequence import Sequence
from jaxserve.types import RequestState, RequestView

Views = tuple[RequestView, ...]

FREE, CACHED, SHARED, FIRST_SLOT = 0, 1, 2, 3
MAX_WAITING = 100  # requests of a long queue that are told apart; stats count all of them


def request_views(decoding: Rows[Sequence], prefilling: Rows[Sequence], waiting: Iterable[Sequence]) -> Views:
    """Those that run, then the first MAX_WAITING that wait in the order of the queue."""
    return (
        *(_view(sequence, "decode") for sequence in decoding),
        *(_view(sequence, "prefill") for sequence in prefilling),
        *(_view(sequence, "waiting") for sequence in islice(waiting, MAX_WAITING)),
    )


def _view(sequence: Sequence, state: RequestState) -> RequestView:
    return RequestView(
        id=sequence.request.id,
        state=state,
        priority=sequence.request.priority,
        slot=sequence.slot,
        prompt_tokens=sequence.num_prompt,
        cached_tokens=sequence.num_cached,
        computed_tokens=sequence.num_computed,
        output_tokens=len(sequence.tokens) - sequence.num_prompt,
        max_output_tokens=sequence.max_length - sequence.num_prompt,
        num_pages=len(sequence.pages),
    )


def joined(ranks: Iterable[tuple[Views, bytes]], max_running: int) -> tuple[Views, bytes]:
    """What ranks of max_running slots each show -> the same as one scheduler's: slots and pages of the second rank come
    behind those of the first."""
    views: list[RequestView] = []
    states: list[np.ndarray] = []
    for rank, (own, pages) in enumerate(ranks):
        views += [view if view.slot < 0 else view._replace(slot=view.slot + rank * max_running) for view in own]
        numbers = np.frombuffer(pages, "<u2")
        states.append(np.where(numbers >= FIRST_SLOT, numbers + rank * max_running, numbers).astype("<u2"))
    return tuple(views), np.concatenate(states).tobytes()


def page_states(pool: PagePool, running: Iterable[Sequence]) -> bytes:
    """The state of each page from 1 on. A pool of 50,000 takes about 3 ms, the CPU default's 0.1."""
    held, in_tree = pool.counts()
    states = np.where(in_tree > 0, CACHED, FREE).astype("<u2")
    for sequence in running:
        states[sequence.pages] = FIRST_SLOT + sequence.slot
    states[held > 1] = SHARED
    return states[1:].tobytes()
