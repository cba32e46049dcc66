"""Page accounting: free, held and cached pages are all pages, and page 0 is nobody's."""

import random

import pytest

from jaxserve.scheduling.pages import PagePool


def test_page_0_is_never_given_out_and_every_other_page_once():
    pool = PagePool(9)
    assert sorted(pool.take(8)) == list(range(1, 9))
    assert (pool.num_pages, pool.num_free, pool.num_held, pool.num_cached) == (8, 0, 8, 0)
    with pytest.raises(AssertionError, match="took 1 of 0"):
        pool.take(1)


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(4)
    (page,) = pool.take(1)
    pool.hold([page])
    pool.release([page])
    assert pool.is_held(page) and pool.num_free == 2
    pool.release([page])
    assert not pool.is_held(page) and pool.num_free == 3


def test_a_page_in_the_tree_is_cached_when_nobody_holds_it_and_can_be_held_again():
    told: list[list[int]] = []
    pool = PagePool(4)
    pool.on_unheld = lambda pages: told.append(list(pages))
    first, second = pool.take(2)
    pool.enter_tree(first)
    pool.release([first, second])
    assert told == [[first]] and (pool.num_free, pool.num_cached, pool.num_available) == (2, 1, 3)
    pool.hold([first])
    assert (pool.num_cached, pool.num_held) == (0, 1)
    pool.release([first])
    pool.leave_tree(first)
    assert (pool.num_free, pool.num_cached) == (3, 0)


def test_a_free_page_cannot_be_shared():
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        pool.hold([1])


def test_counts_agree_after_any_sequence_of_operations():
    for seed in range(50):
        rng, pool = random.Random(seed), PagePool(20)
        held: list[int] = []
        for _ in range(200):
            action = rng.randrange(5)
            if action == 0 and pool.num_free:
                held += pool.take(rng.randint(0, pool.num_free))
            elif action == 1 and held:
                page = rng.choice(held)
                if not pool.is_in_tree(page):
                    pool.enter_tree(page)
            elif action == 2 and held:
                pool.release([held.pop(rng.randrange(len(held)))])
            elif action == 3:
                pages = [p for p in range(1, 20) if pool.is_in_tree(p)][:2]
                pool.hold(pages)
                held += pages
            elif action == 4:
                for page in [p for p in range(1, 20) if pool.is_in_tree(p) and not pool.is_held(p)][:2]:
                    pool.leave_tree(page)
            pool.check_invariants(held)
            assert pool.num_free + pool.num_held + pool.num_cached == pool.num_pages, f"seed {seed}"
