"""The prefix cache: a tree in which one node is one page of tokens, keyed (namespace, tokens).

Worked example, page size 2, two prompts "a b c d e" and "a b x y z" in namespace 0:

    root ─ (0, "a b") page 7 ─┬─ "c d" page 3
                              └─ "x y" page 9          e and z are no whole page and stay out

A sequence holds every page from the root down to its own deepest node, so the pages nobody holds are always whole
branches below the held ones: taking leaves, least recently used first, reaches each of them. After RadixAttention
(Zheng et al., SGLang, 2024, section 3), with whole pages in place of a compressed trie.
"""

import heapq
from array import array
from collections.abc import Sequence

from jaxserve.scheduling.pages import PagePool


class Node:
    """One page in the tree. depth counts pages from the root; a node that was evicted stays alive = False for ever."""

    __slots__ = ("alive", "children", "depth", "key", "page", "parent", "stamp")

    def __init__(self, page: int, parent: "Node | None", key: object, stamp: int) -> None:
        self.page = page
        self.parent = parent
        self.key = key
        self.stamp = stamp  # when a sequence last used it, in ticks of the tree
        self.children: dict[object, Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.alive = True


class RadixTree:
    """Prefixes whose pages can be reused. It owns no clock: a tick passes when a sequence gives its pages back."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.root = Node(0, None, None, 0)
        self.evictions_total = 0
        self._pool = pool
        self._page_size = page_size
        self._node_of: dict[int, Node] = {}
        self._tick = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (stamp, tie, node); stale entries are skipped
        self._tie = 0
        pool.on_unheld = self._on_unheld

    def key(self, tokens: "array[int]", namespace: int, index: int) -> object:
        """Key of page index of a sequence, as a child of the node before it."""
        start = index * self._page_size
        page = tokens[start : start + self._page_size].tobytes()
        return page if index else (namespace, page)

    def find(self, tokens: "array[int]", namespace: int, max_pages: int, start: Node | None = None) -> Node:
        """Deepest node on the path of tokens, at most max_pages deep. start: an earlier answer for the same tokens."""
        node = start or self.root
        while not node.alive or node.depth > max_pages:  # a living node's ancestors are all alive
            assert node.parent is not None
            node = node.parent
        while node.depth < max_pages:
            child = node.children.get(self.key(tokens, namespace, node.depth))
            if child is None:
                break
            node = child
        return node

    def depth_of(self, token_ids: Sequence[int], namespace: int) -> int:
        """Pages of a prompt that a match may cover and that are here now."""
        return self.find(array("i", token_ids), namespace, (len(token_ids) - 1) // self._page_size).depth

    def pages(self, node: Node) -> list[int]:
        """Pages from the root to node."""
        pages: list[int] = []
        while node.parent is not None:
            pages.append(node.page)
            node = node.parent
        pages.reverse()
        return pages

    def insert(
        self, node: Node, tokens: "array[int]", namespace: int, pages: Sequence[int], depth: int, passing: bool
    ) -> Node:
        """Add pages[node.depth : depth] below node; returns the deepest node on the path.

        Where the tree has the same tokens in another page, that page stays: the path stops before it, or, passing,
        goes on through it. Only a sequence that releases its pages next may pass, since it would otherwise hold a page
        below one that it does not hold.
        """
        while node.depth < depth:
            page, key = pages[node.depth], self.key(tokens, namespace, node.depth)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(page, node, key, self._tick)
                self._node_of[page] = child
                self._pool.enter_tree(page)
            elif child.page != page and not passing:
                break
            node = child
        return node

    def evict(self, count: int) -> int:
        """Free up to count cached pages, least recently used leaves first; returns how many. O(log n) each."""
        evicted = 0
        while evicted < count and self._leaves:
            stamp, _, node = heapq.heappop(self._leaves)
            if stamp != node.stamp or not self._is_evictable(node):
                continue
            parent = node.parent
            assert parent is not None
            node.alive = False
            del parent.children[node.key], self._node_of[node.page]
            self._pool.leave_tree(node.page)
            evicted += 1
            if parent is not self.root and self._is_evictable(parent):
                self._push(parent)
        self.evictions_total += evicted
        return evicted

    def _is_evictable(self, node: Node) -> bool:
        return node.alive and not node.children and not self._pool.is_held(node.page)

    def _on_unheld(self, pages: Sequence[int]) -> None:
        self._tick += 1
        for page in pages:
            node = self._node_of[page]
            node.stamp = self._tick
            if not node.children:
                self._push(node)

    def _push(self, node: Node) -> None:
        self._tie += 1
        heapq.heappush(self._leaves, (node.stamp, self._tie, node))
        if len(self._leaves) > 2 * self._pool.num_pages + 64:
            self._leaves = [e for e in self._leaves if e[0] == e[2].stamp and self._is_evictable(e[2])]
            heapq.heapify(self._leaves)

    def check_invariants(self) -> None:
        """AssertionError unless the tree, its page index and the pool agree."""
        nodes, todo = [], list(self.root.children.values())
        while todo:
            node = todo.pop()
            nodes.append(node)
            todo.extend(node.children.values())
            assert node.alive and node.parent is not None and node.parent.children[node.key] is node
            assert self._pool.is_in_tree(node.page)
            if self._pool.is_held(node.page) and node.parent is not self.root:
                assert self._pool.is_held(node.parent.page), "a held page below one that is not held"
        assert {node.page: node for node in nodes} == self._node_of
        queued = {id(node) for stamp, _, node in self._leaves if stamp == node.stamp}
        missing = [node.page for node in nodes if self._is_evictable(node) and id(node) not in queued]
        assert not missing, f"pages {missing} can never be evicted"
