"""How long links are occupied, against figures worked out by hand on rings and lines of a few chips."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from kimi_jax.ahead import torus
from kimi_jax.ahead.collectives import Collective
from kimi_jax.ahead.hardware import CHIPS, LINK_EFFICIENCY

V5P, V6E, TPU7X = CHIPS["TPU v5"], CHIPS["TPU v6"], CHIPS["TPU7x"]
W = 100e9 * LINK_EFFICIENCY  # one link, one way


def chips(*extent: int, per_chip: int = 1) -> list[SimpleNamespace]:
    """Devices in row-major order."""
    at = [index for index in np.ndindex(*extent) for _ in range(per_chip)]
    return [SimpleNamespace(coords=index) for index in at]


def collective(kind: str, group: list[int], bytes_: float = 1e9) -> Collective:
    return Collective(kind, ("expert",), tuple(group), (), bytes_, 1, "forward")


@pytest.mark.parametrize(
    ("group", "links"),
    [
        ([0, 1, 2, 3], 2),  # a ring along the last dimension: both directions
        ([0, 1], 1),  # half of it: a line
        ([0, 2], 1),  # every second chip, all the way round: both directions, shared by two groups
        (list(range(16)), 4),  # a plane of two rings
        (list(range(64)), 6),
    ],
)
def test_gathers_use_every_ring_they_have(group, links):
    took = torus.seconds(collective("all-gather", group), chips(4, 4, 4), (4, 4, 4), V5P)
    assert took == pytest.approx(1e9 / (links * W))


def test_a_pod_of_v6e_is_a_torus_and_less_is_a_grid():
    row = collective("reduce-scatter", list(range(16)))
    assert torus.seconds(row, chips(16, 16), (16, 16), V6E) == pytest.approx(1e9 / (2 * W))
    assert torus.seconds(row, chips(8, 16), (8, 16), V6E) == pytest.approx(1e9 / (2 * W))
    assert torus.seconds(collective("reduce-scatter", list(range(8))), chips(8, 8), (8, 8), V6E) == pytest.approx(
        1e9 / W
    )


def test_v5p_wraps_from_whole_cubes_on():
    ring = collective("all-gather", [0, 1, 2, 3])
    assert torus.seconds(ring, chips(2, 4, 4), (2, 4, 4), V5P) == pytest.approx(1e9 / W)


def busiest_link(n: int, ring: bool) -> float:
    """Of n chips that each send 1 / (n - 1) to every other one, the shorter way, halves where both are as short."""
    load = np.zeros((n, 2))
    for a in range(n):
        for b in (b for b in range(n) if b != a):
            up, down = (b - a) % n, (a - b) % n
            if not ring:
                ways = [(b > a, abs(b - a), 1.0)]
            else:
                ways = [(up <= down, min(up, down), 1.0)] if up != down else [(True, up, 0.5), (False, up, 0.5)]
            for upward, steps, share in ways:
                for k in range(steps):
                    link = (a + k) % n if upward else (a - k - 1) % n
                    load[link, int(upward)] += share / (n - 1)
    return load.max()


@pytest.mark.parametrize(("n", "ring"), [(4, True), (8, True), (16, True), (4, False), (8, False)])
def test_all_to_all_fills_the_busiest_link(n, ring):
    """Counted link by link. What an all-to-all sends leaves out what a device keeps; a ragged one's bytes do not."""
    extent = (n, 4, 4) if ring else (n, 2, 2)
    devices = chips(*extent)
    group = [extent[1] * extent[2] * k for k in range(n)]
    expected = pytest.approx(1e9 * busiest_link(n, ring) / W)
    assert torus.seconds(collective("all-to-all", group), devices, extent, V5P) == expected
    assert torus.seconds(collective("ragged-all-to-all", group, 1e9 * n / (n - 1)), devices, extent, V5P) == expected


def test_the_longest_dimension_bounds_an_exchange():
    plane = collective("ragged-all-to-all", list(range(32)))  # 4 x 8
    assert torus.seconds(plane, chips(4, 4, 8), (4, 4, 8), V5P) == pytest.approx(1e9 * 8 / (8 * W))


def test_devices_of_a_chip_share_its_links():
    devices = chips(4, 4, 4, per_chip=2)
    ring = collective("all-gather", list(range(8)))  # both devices of four chips
    assert torus.seconds(ring, devices, (4, 4, 4), TPU7X) == pytest.approx(1e9 / (2 * W / 2))
    assert torus.seconds(collective("all-gather", [0, 1]), devices, (4, 4, 4), TPU7X) == 0


def test_a_permutation_takes_its_longest_way():
    neighbours = tuple((k, (k + 1) % 4) for k in range(4))
    far = tuple((k, (k + 2) % 4) for k in range(4))
    base = dataclasses.replace(collective("collective-permute", []), hops=neighbours)
    assert torus.seconds(base, chips(4, 4, 4), (4, 4, 4), V5P) == pytest.approx(1e9 / W)
    across = dataclasses.replace(base, hops=far)
    assert torus.seconds(across, chips(4, 4, 4), (4, 4, 4), V5P) == pytest.approx(2e9 / W)
    assert torus.seconds(base, chips(2, 2, 4), (2, 2, 4), V5P) == pytest.approx(1.5e9 / W)  # 1, 1, 1 and back: 3
