"""Processes, here threads, agree on what their copies together hold, and give each other what is missing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kimi_jax.checkpoint.emergency import Save
from kimi_jax.checkpoint.emergency_exchange import Exchange, History, choose, read_history, transfers
from kimi_jax.errors import UserError

A, B, C = (f"{name} float32 [0:2/2]" for name in "abc")
OLD, NEW = Save(20, "s0"), Save(40, "s0")
NEED = {0: {A, B}, 1: {B, C}}


def test_the_newest_that_is_whole_is_chosen():
    assert choose([{NEW: {A}, OLD: {A, B}}, {NEW: {B, C}, OLD: {C}}], NEED) == (NEW, "")
    assert choose([{NEW: {A}, OLD: {A, B}}, {NEW: {C}, OLD: {C}}], NEED) == (OLD, "")  # the last was under way
    assert choose([{Save(9, "s0"): {A, B, C}}, {Save(10, "s0"): {A, B, C}}], NEED)[0] == Save(10, "s0")
    assert choose([{}, {}], NEED) == (None, "")


def test_why_none_is_chosen():
    save, why = choose([{NEW: {A}, OLD: {A, B}}, {NEW: {B}}], NEED)
    assert save is None and "step 40" in why and f"1 of 3 pieces are missing, such as {C}" in why
    save, why = choose([{NEW: {A, B, C, "d float32 []"}}, {}], NEED)
    assert save is None and "also hold d float32" in why


def test_two_starts_do_not_make_one_save():
    assert choose([{Save(40, "s0"): {A, B}}, {Save(40, "s1"): {C}}], NEED)[0] is None


def test_only_what_lacks_travels_and_donors_take_turns():
    assert transfers([{A, B}, {B, C}], NEED) == {}
    assert transfers([{A, B, C}, set()], NEED) == {(0, 1): [B, C]}
    have = [{A, B, C}, {A, B, C}, set()]
    assert transfers(have, {0: {A}, 1: {B}, 2: {A, B, C}}) == {(0, 2): [A, C], (1, 2): [B]}


def together(f, n: int) -> list:
    """f(process, meet) on n threads."""
    barrier = threading.Barrier(n, timeout=30)
    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(lambda process: f(process, barrier.wait), range(n)))


def test_a_process_that_lost_its_folder_is_given_its_pieces(tmp_path):
    values = {name: np.float32([i, i]) for i, name in enumerate((A, B, C))}
    killed = tmp_path / "emergency" / "s-1"
    killed.mkdir(parents=True)

    def one(process, meet):
        mine = dict(values) if process == 0 else {}
        exchange = Exchange(tmp_path, "s1", process, 2, meet)
        lists = exchange.lists({NEW: set(mine)} if mine else {})
        save, why = choose(lists, NEED)
        assert save == NEW, why
        found = exchange.completed(mine, [having.get(save, set()) for having in lists], NEED)
        found = {name: np.array(found[name]) for name in NEED[process]}
        exchange.close(History("r", "s1", save))
        return found

    for process, found in enumerate(together(one, 2)):
        assert found.keys() == NEED[process]
        for name, value in found.items():
            np.testing.assert_array_equal(value, values[name])
    assert [path.name for path in (tmp_path / "emergency").iterdir()] == ["history.json"]


def test_the_history_knows_the_last_start_and_what_it_went_on_from(tmp_path):
    assert read_history(tmp_path) is None

    def one(process, meet):
        exchange = Exchange(tmp_path, "s1", process, 1, meet)
        exchange.lists({})
        exchange.close(History("r", "s1", Save(20, "s0")))

    together(one, 1)
    history = read_history(tmp_path)
    assert history == History("r", "s1", Save(20, "s0"))
    assert history.holds(Save(20, "s0")) and history.holds(Save(40, "s1"))
    assert not history.holds(Save(40, "s0"))  # left behind when s1 went on from step 20
    (tmp_path / "emergency" / "history.json").write_text("{")
    with pytest.raises(UserError, match="history.json"):
        read_history(tmp_path)
