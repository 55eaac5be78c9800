"""Every item once, by several threads; the first error ends the work."""

from __future__ import annotations

import threading

import pytest

from kimi_jax.checkpoint.threads import for_each


@pytest.mark.parametrize("workers", [1, 4])
def test_every_item_once(workers):
    found = []
    for_each(found.append, iter(range(100)), workers)
    assert sorted(found) == list(range(100))


def test_after_an_error_nothing_new_is_begun():
    """Both threads are busy when it happens: the other one ends what it does before the error is raised."""
    both, failed, begun, ended = threading.Barrier(2), threading.Event(), [], []

    def work(i):
        begun.append(i)
        both.wait(10)
        if i == 0:
            failed.set()
            raise KeyError(i)
        assert failed.wait(10)
        ended.append(i)

    with pytest.raises(KeyError):
        for_each(work, range(2), 2)
    assert sorted(begun) == [0, 1] and ended == [1]

    begun.clear()

    def fail(i):
        begun.append(i)
        raise KeyError(i)

    with pytest.raises(KeyError):
        for_each(fail, range(100), 1)
    assert begun == [0]
