"""The prefix tree against a dictionary of prefixes, and its eviction order against a list of uses."""

import random
import time
from array import array

from jaxserve.scheduling.pages import PagePool
from jaxserve.scheduling.radix import Node, RadixTree

SIZE = 4


def make(num_pages: int = 64) -> tuple[PagePool, RadixTree]:
    pool = PagePool(num_pages)
    return pool, RadixTree(pool, SIZE)


def store(pool: PagePool, tree: RadixTree, tokens: list[int], namespace: int = 0) -> tuple[Node, list[int]]:
    """Compute tokens as a sequence would that finds nothing and finishes; returns its node and pages."""
    pages = pool.take(len(tokens) // SIZE)
    node = tree.insert(tree.root, array("i", tokens), namespace, pages, len(pages), passing=True)
    pool.release(pages)
    return node, pages


def find(tree: RadixTree, tokens: list[int], namespace: int = 0, max_pages: int = 99) -> list[int]:
    return tree.pages(tree.find(array("i", tokens), namespace, min(max_pages, len(tokens) // SIZE)))


def test_only_whole_pages_of_the_same_namespace_match():
    pool, tree = make()
    tokens = list(range(12))
    _, pages = store(pool, tree, tokens)
    assert find(tree, tokens) == pages
    assert find(tree, [*tokens[:11], 99]) == pages[:2]
    assert find(tree, tokens[:7]) == pages[:1]
    assert find(tree, tokens, max_pages=2) == pages[:2]
    assert find(tree, tokens, namespace=1) == [] == find(tree, [99, *tokens[1:]])
    tree.check_invariants()


def test_a_second_copy_of_a_page_is_not_kept():
    pool, tree = make()
    _, first = store(pool, tree, list(range(8)))
    _, second = store(pool, tree, list(range(12)))
    assert find(tree, list(range(12))) == first + second[2:]
    assert pool.num_cached == 3
    tree.check_invariants()


def test_a_sequence_that_goes_on_running_stops_before_a_foreign_page():
    pool, tree = make()
    store(pool, tree, list(range(8)))
    pages = pool.take(3)
    node = tree.insert(tree.root, array("i", range(12)), 0, pages, 3, passing=False)
    assert node is tree.root and pool.num_cached == 2
    tree.check_invariants()


def test_an_old_cursor_finds_what_came_and_forgets_what_went():
    pool, tree = make()
    tokens = array("i", range(16))
    store(pool, tree, list(range(8)))
    cursor = tree.find(tokens, 0, 4)
    assert cursor.depth == 2
    store(pool, tree, list(range(16)))
    assert tree.find(tokens, 0, 4, cursor).depth == 4
    cursor = tree.find(tokens, 0, 4, cursor)
    assert tree.evict(3) == 3
    assert tree.find(tokens, 0, 4, cursor).depth == 1
    assert tree.find(tokens, 0, 0, cursor) is tree.root


def test_eviction_takes_the_least_recently_used_leaf_and_never_a_held_page():
    pool, tree = make()
    _, old = store(pool, tree, [1] * 8)
    _, new = store(pool, tree, [2] * 8)
    pool.hold(old)
    pool.release(old)  # used again: new is the older one now
    assert tree.evict(1) == 1 and find(tree, [2] * 8) == new[:1]
    assert tree.evict(1) == 1 and find(tree, [2] * 8) == []
    pool.hold(old[:1])
    assert tree.evict(99) == 1 and find(tree, [1] * 8) == old[:1]
    tree.check_invariants()


def test_the_tree_agrees_with_a_dictionary_of_prefixes():
    for seed in range(30):
        rng = random.Random(seed)
        pool, tree = make(40)
        model: dict[tuple[int, ...], int] = {}
        for _ in range(120):
            tokens = [rng.randrange(2) for _ in range(rng.choice((4, 8, 12, 16)))]
            want = []
            for end in range(SIZE, len(tokens) + 1, SIZE):
                if tuple(tokens[:end]) not in model:
                    break
                want.append(model[tuple(tokens[:end])])
            assert find(tree, tokens) == want, f"seed {seed}"
            short = len(tokens) // SIZE - pool.num_free
            if short > 0:
                assert tree.evict(short) == short
                model = {prefix: page for prefix, page in model.items() if pool.is_in_tree(page)}
            _, pages = store(pool, tree, tokens)
            for index, page in enumerate(pages):
                model.setdefault(tuple(tokens[: (index + 1) * SIZE]), page)
            tree.check_invariants()
            pool.check_invariants([])
        tree.evict(pool.num_cached)
        assert pool.num_free == pool.num_pages and not tree.root.children


def test_eviction_does_not_walk_the_tree():
    """Twenty times the pages may not make one eviction twenty times as slow; a walk would."""

    def seconds_each(num_pages: int) -> float:
        pool, tree = make(num_pages + 1)
        for i in range(num_pages // 2):
            store(pool, tree, [i] * 8)
        best = 1.0
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(100):
                tree.evict(1)
            best = min(best, (time.perf_counter() - start) / 100)
        return best

    assert seconds_each(40_000) < 8 * seconds_each(2_000)


def test_stale_eviction_candidates_do_not_pile_up():
    pool, tree = make(17)
    _, pages = store(pool, tree, [1] * 8)
    for _ in range(5000):
        pool.hold(pages)
        pool.release(pages)
    assert len(tree._leaves) <= 2 * pool.num_pages + 65
    assert tree.evict(2) == 2
