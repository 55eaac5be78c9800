"""Process 0 goes first, and whoever comes early waits for it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_jax.training.turns import process_0_first


def session(process: int, mark: str, processes: int = 3) -> Any:
    return SimpleNamespace(process=process, processes=processes, mark=mark)


def test_the_others_wait_in_every_start(tmp_path):
    def enter(process, mark):
        with process_0_first(tmp_path, session(process, mark)):
            time.sleep(0.0 if process else 0.3)
            order.append(process)

    for mark in ("one", "two"):
        order = []
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda process, mark=mark: enter(process, mark), (2, 1, 0)))
        assert order[0] == 0 and sorted(order) == [0, 1, 2]
        assert len(list(tmp_path.iterdir())) == 1


def test_nobody_enters_after_an_error(tmp_path):
    with pytest.raises(OSError, match="disk"), process_0_first(tmp_path, session(0, "one")):
        raise OSError("disk")
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_alone_leaves_nothing(tmp_path):
    with process_0_first(tmp_path, session(0, "", processes=1)):
        pass
    assert not list(tmp_path.iterdir())
