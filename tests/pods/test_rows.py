"""The rows that a process loads, for any order of devices: those that its shards hold, and each counted once."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from kimi_jax.pods.rows import Rows


class Device(NamedTuple):
    process_index: int
    at: tuple[int, int]


class Layout:
    """A sharding over processes that are not there: [rows, columns] of devices, each by its process's number."""

    def __init__(self, processes: list[list[int]]):
        self.processes = np.array(processes)

    def devices_indices_map(self, shape):
        n, m = self.processes.shape
        rows, columns = shape[0] // n, shape[1] // m
        return {
            Device(int(self.processes[i, j]), (i, j)): (
                slice(i * rows, (i + 1) * rows) if n > 1 else slice(None),
                slice(j * columns, (j + 1) * columns),
            )
            for i, j in itertools.product(range(n), range(m))
        }


@pytest.mark.parametrize(
    "processes",
    [
        [[0, 0], [1, 1], [2, 2], [3, 3]],  # rows by process
        [[0, 1], [2, 3]],  # columns of a row on two processes
        [[0, 1, 2, 3]],  # every process holds all rows
        [[3], [0], [2], [1], [3], [0], [2], [1]],  # rows of a process apart
        [[0, 0], [1, 2], [0, 3], [2, 1]],
    ],
)
def test_rows_by_brute_force(monkeypatch, processes):
    shape, layout, counted = (16, 8), Layout(processes), []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows = Rows(layout, shape)
        per_device = shape[0] // len(processes)
        held = [row for row in range(shape[0]) if process in processes[row // per_device]]
        assert rows.loaded == held
        counted += [row for row, owned in zip(rows.loaded, rows.owned, strict=True) if owned]
    assert sorted(counted) == list(range(shape[0]))


def test_placed_where_it_belongs():
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows, whole = Rows(sharding, (4, 3)), np.arange(12, dtype=np.int32).reshape(4, 3)
    placed = rows.place(whole)
    assert placed.sharding == sharding and rows.owned.all()
    np.testing.assert_array_equal(placed, whole)


@pytest.mark.parametrize("order", [[0, 5, 2, 7, 1, 4, 3, 6], [3, 2, 1, 0, 7, 6, 5, 4]])
def test_shards_are_cut_from_the_rows_that_were_loaded(monkeypatch, order):
    """``make_array_from_callback`` asks for the shards of this process alone; here for those of process 1."""
    processes = np.array(order).reshape(4, 2) // 4  # two processes of four devices
    shape, whole = (8, 6), np.arange(48).reshape(8, 6)
    layout = Layout(processes.tolist())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    asked = [index for device, index in layout.devices_indices_map(shape).items() if device.process_index == 1]
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, shard: [shard(i) for i in asked])
    rows = Rows(layout, shape)
    for shard, index in zip(rows.place(whole[rows.loaded]), asked, strict=True):
        np.testing.assert_array_equal(shard, whole[index])
