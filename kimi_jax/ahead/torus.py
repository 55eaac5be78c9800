"""How long a collective occupies the links of the torus, from where its devices stand.

A group of devices occupies n_d of a dimension's positions, s_d apart: s_d groups then share each of its links. With a
link's rate w in each direction, and w' = w / (s_d x devices per chip), a dimension moves

    2 w'  if it is a ring (it wraps, and the group goes all the way round),  w'  if it is a line.

Gathers and reductions use all their dimensions at once: bytes / sum of these. In an all-to-all a byte travels n_d / 4
links of a ring, half of all bytes each way; in the middle of a line, n_d / 4 devices' worth of bytes pass each way. The
slowest dimension decides, for an operand that counts what a device keeps, too:

    operand n_d / (8 w')  on a ring,  operand n_d / (4 w')  on a line.

A permutation is as slow as the dimension with the longest way on average. What stays on a chip is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_jax.ahead.collectives import Collective
from kimi_jax.ahead.hardware import LINK_EFFICIENCY, Chip

EXCHANGES = ("all-to-all", "ragged-all-to-all")


@dataclass(frozen=True)
class Side:
    """One dimension of the torus as a group of devices occupies it."""

    positions: int
    apart: int
    ring: bool


def sides(coordinates: np.ndarray, extent: Sequence[int], chip: Chip) -> list[Side]:
    """``coordinates`` [devices of a group, dimensions]: the dimensions that the group extends over."""
    found = []
    for along, size in zip(coordinates.T, extent, strict=True):
        at = np.unique(along)
        if len(at) > 1:
            apart = int(np.diff(at).min())
            found.append(Side(len(at), apart, wraps(size, extent, chip) and len(at) * apart == size))
    return found


def wraps(size: int, extent: Sequence[int], chip: Chip) -> bool:
    """Whether a dimension closes to a ring."""
    return size % chip.wrap == 0 and (not chip.cubes or min(extent) >= chip.wrap)


def seconds(c: Collective, devices: Sequence[Any], extent: Sequence[int], chip: Chip) -> float:
    """Per step; ``devices`` in the order of the mesh."""
    rate = chip.link_bytes_per_s * LINK_EFFICIENCY / chip.devices
    if c.hops:
        return c.bytes * _longest_way(c, devices, extent, chip) / rate
    found = sides(np.array([devices[n].coords for n in c.group]), extent, chip)
    if not found:  # all on one chip
        return 0.0
    rates = [(2 if side.ring else 1) * rate / side.apart for side in found]
    if c.kind in EXCHANGES:
        kept = 0 if c.kind == "ragged-all-to-all" else 1 / len(c.group)  # its bytes leave out what stays
        operand = c.bytes / (1 - kept)
        return max(operand * side.positions / 4 / r for side, r in zip(found, rates, strict=True))
    return c.bytes / sum(rates)


def _longest_way(c: Collective, devices: Sequence[Any], extent: Sequence[int], chip: Chip) -> float:
    """Links in one direction that a byte of a permutation takes, on average, in the worst dimension."""
    ends = np.array([[devices[a].coords, devices[b].coords] for a, b in c.hops])
    way = np.abs(ends[:, 0] - ends[:, 1])
    rings = np.array([wraps(size, extent, chip) for size in extent])
    way = np.where(rings, np.minimum(way, np.array(extent) - way), way)
    return float(way.mean(axis=0).max())
