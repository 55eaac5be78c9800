"""Page counts against sets of holders."""

from __future__ import annotations

import random

import pytest

from kimi_jax.inference.pages import PagePool
from kimi_jax.inference.prefix import chain


def keys_of(*contents: int) -> list[bytes]:
    return chain([], [token for token in contents for _ in range(2)], 2, len(contents))


def filled(pool: PagePool, *contents: int) -> list[int]:
    """Pages of a sequence that was computed and published."""
    pages = pool.take(len(contents))
    for page, key in zip(pages, keys_of(*contents), strict=True):
        pool.publish(page, key)
    return pages


def test_a_key_depends_on_all_tokens_before():
    one, other = keys_of(1, 2, 3), keys_of(4, 2, 3)
    assert len({*one, *other}) == 6 and keys_of(1, 2, 5)[:2] == one[:2]
    tokens = [1, 1, 2, 2, 3, 3]
    assert chain(chain([], tokens[:2], 2, 1), tokens, 2, 3) == one


def test_page_0_is_never_handed_out():
    pool = PagePool(5)
    assert sorted(pool.take(4)) == [1, 2, 3, 4] and pool.available == 0
    with pytest.raises(AssertionError):
        pool.take(1)


def test_a_page_given_back_twice_is_noticed():
    pool = PagePool(5)
    pages = pool.take(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.release(pages[:1])


def test_the_longest_known_prefix_is_shared():
    pool = PagePool(9)
    pages = filled(pool, 1, 2, 3)
    pool.release(pages)
    assert pool.in_use == 0
    assert pool.known(keys_of(1, 2, 9, 3)) == (2, 2) and pool.known(keys_of(2)) == (0, 0)
    assert pool.share(keys_of(1, 2, 9, 3)) == pages[:2] and pool.in_use == 2
    assert pool.known(keys_of(1, 2, 3)) == (3, 1)
    assert pool.share(keys_of(1, 2, 3)) == pages and pool.in_use == 3
    assert pool.share(keys_of(2, 3)) == []
    pool.release(pages)
    assert pool.in_use == 2


def test_the_least_recently_used_prefix_loses_its_end_first():
    pool = PagePool(6)
    old, new = filled(pool, 1, 2), filled(pool, 3, 4, 5)
    pool.release(new)
    pool.release(old)
    pool.release(pool.share(keys_of(3, 4, 5)))  # used again: now ``old`` is the older
    assert pool.take(1) == [old[1]] and pool.take(1) == [old[0]]
    assert pool.take(1) == [new[2]] and pool.share(keys_of(3, 4, 5)) == new[:2]


def test_free_pages_go_before_cached_ones():
    pool = PagePool(6)
    pages = filled(pool, 1, 2)
    pool.release(pages)
    assert not set(pool.take(3)) & set(pages)
    assert pool.share(keys_of(1, 2)) == pages


def test_of_two_pages_with_the_same_content_one_is_shared():
    pool = PagePool(5)
    first, second = filled(pool, 1), filled(pool, 1)
    pool.release(first)
    assert pool.share(keys_of(1)) == first and pool.in_use == 2
    pool.release(second)
    pool.release(first)
    assert pool.in_use == 0 and sorted(pool.take(4)) == [1, 2, 3, 4]


def test_random_use_keeps_the_books():
    rng, pool, held = random.Random(0), PagePool(24), []
    for _ in range(4000):
        contents = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        keys = keys_of(*contents)
        if rng.random() < 0.5 and pool.available >= len(keys):
            pages = pool.share(keys)
            pages += pool.take(len(keys) - len(pages)) if pool.available >= len(keys) - len(pages) else []
            for page, key in zip(pages, keys, strict=False):
                pool.publish(page, key)
            held.append((pages, keys[: len(pages)]))
        elif held:
            pages, keys = held.pop(rng.randrange(len(held)))
            found = pool.share(keys)
            assert len(found) == len(keys)  # what is held is never evicted
            pool.release(found)
            pool.release(pages)
        used = {page for pages, _ in held for page in pages}
        assert pool.in_use == len(used) and 0 not in used
    for pages, _ in held:
        pool.release(pages)
    assert pool.in_use == 0 and sorted(pool.take(23)) == list(range(1, 24))
