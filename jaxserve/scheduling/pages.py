"""Who holds which page of the KV cache. Page 0 is scratch for padding and never given out.

A page is in exactly one state:   free     no sequence holds it, its content means nothing
                                  held     one or more sequences hold it (it may be in the prefix tree as well)
                                  cached   in the prefix tree and held by no sequence: can be evicted
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


class PagePool:
    """Reference counts of num_pages pages (page 0 included in the count, never given out)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages - 1
        self.num_cached = 0
        self.on_unheld: Callable[[Sequence[int]], None] | None = None  # told of the pages that became cached
        self._free = list(range(num_pages - 1, 0, -1))
        self._refs = [0] * num_pages
        self._in_tree = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_cached - len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that are free or can be made so by eviction alone."""
        return self.num_cached + len(self._free)

    def is_held(self, page: int) -> bool:
        return self._refs[page] > 0

    def is_in_tree(self, page: int) -> bool:
        return bool(self._in_tree[page])

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """-> the sequences that hold each page [num_pages + 1], and whether it is in the prefix tree (0 or 1)."""
        return np.array(self._refs, np.int32), np.array(self._in_tree, np.uint8)

    def take(self, count: int) -> list[int]:
        """count free pages, each held once; the caller has made sure that there are as many."""
        if count == 0:
            return []
        assert 0 < count <= len(self._free), f"took {count} of {len(self._free)} free pages"
        pages = self._free[-count:]
        del self._free[-count:]
        for page in pages:
            self._refs[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more sequence holds these pages, all of them held or cached."""
        for page in pages:
            if self._refs[page] == 0:
                assert self._in_tree[page], f"page {page} is free and cannot be shared"
                self.num_cached -= 1
            self._refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One sequence fewer holds these pages; those nobody holds become cached or free."""
        cached = []
        for page in pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                (cached if self._in_tree[page] else self._free).append(page)
        self.num_cached += len(cached)
        if cached and self.on_unheld is not None:
            self.on_unheld(cached)

    def enter_tree(self, page: int) -> None:
        """A held page is now in the prefix tree."""
        assert self._refs[page] > 0 and not self._in_tree[page]
        self._in_tree[page] = 1

    def leave_tree(self, page: int) -> None:
        """A cached page was evicted; it is free now."""
        assert self._refs[page] == 0 and self._in_tree[page]
        self._in_tree[page] = 0
        self.num_cached -= 1
        self._free.append(page)

    def check_invariants(self, held: Sequence[int]) -> None:
        """held: the pages of every sequence, one after the other. AssertionError unless the counts agree with it."""
        refs = [0] * len(self._refs)
        for page in held:
            refs[page] += 1
        assert refs == self._refs, "reference counts differ from what the sequences hold"
        assert refs[0] == 0, "the scratch page is held"
        free = set(self._free)
        assert len(free) == len(self._free) and 0 not in free, "a page is free twice"
        assert all(refs[page] == 0 and not self._in_tree[page] for page in free), "a free page is in use"
        cached = sum(self._in_tree[page] and not refs[page] for page in range(len(refs)))
        assert cached == self.num_cached, f"counted {cached} cached pages, kept {self.num_cached}"
        used = sum(count > 0 for count in refs)
        assert len(free) + used + cached == self.num_pages, "free + held + cached is not all"
