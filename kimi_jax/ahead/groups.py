"""Which devices a collective joins, and along which axes of the mesh.

A program numbers its devices by their place in ``mesh.devices.flat``. Of several slices it sees one: there, numbers
stay below the size of a slice, and what crosses slices is a ``send`` of its own (see ``collectives``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

Groups = np.ndarray  # [groups, devices of a group]


def groups(attributes: str, devices: int) -> Groups:
    """``replica_groups`` in any of the ways that XLA writes it, or the two ends of every ``source_target_pairs``.

    Without any, and for a mesh in an order of its own, which hides what is joined, all ``devices`` are one group.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted:
        shape, laid, order = (_integers(text) for text in counted.groups())
        ids = np.arange(math.prod(laid)).reshape(laid)
        return (ids.transpose(order) if order else ids).reshape(shape)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](, device_ids=\S+)? \{([^}]*)\}", attributes)
    return _of_axes(named[1], named[3]) if named and not named[2] else np.arange(devices)[None]


def _integers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _of_axes(mesh: str, chosen: str) -> Groups:
    """``'a'=8,'b'=64`` and ``'b'``: the devices that differ in b alone. ``'b':(2)4`` is the part of b, sized 4, that
    comes after a part of size 2."""
    sizes: list[int] = []
    grouped: list[int] = []
    named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    parts = {name: (int(pre or 1), int(n or 0)) for name, pre, n in named}
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        pre, n = parts.get(name, (int(size), 1))
        n = n or int(size) // pre
        if name in parts:
            grouped.append(len(sizes) + 1)
        sizes += [pre, n, int(size) // (pre * n)]
    rest = [i for i in range(len(sizes)) if i not in grouped]
    ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(rest + grouped)
    return ids.reshape(-1, math.prod(sizes[i] for i in grouped))


def mesh_axes(found: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    coordinates = np.stack(np.unravel_index(found, tuple(mesh.values())))
    differ = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, moves in zip(mesh, differ, strict=True) if moves)
