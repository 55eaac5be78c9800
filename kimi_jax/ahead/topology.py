"""TPU slices that are not there: their devices, and where these stand on the torus."""

from __future__ import annotations

import os
import re
from typing import Any

from kimi_jax.ahead.hardware import CHIPS
from kimi_jax.errors import UserError

EXAMPLES = "such as v5p:8x8x8, v6e:16x16 or tpu7x:4x4x8"


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of ``slices`` slices of a topology such as ``v5p:8x8x8``, without having them."""
    if slices < 1:
        raise UserError(f"slices must be at least 1, not {slices}")
    if re.search(r"[=_:x]0+(x|_|$)", name):  # libtpu would divide by it
        raise UserError(f"{name!r} is no topology, {EXAMPLES}")
    for key, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    many = {"num_slices": slices} if slices > 1 else {}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **many).devices)
    except Exception as error:
        first = str(error).partition("\n")[0][:200]
        if "not installed" in first:
            raise UserError("libtpu is not installed: pip install '.[aot]' in the checkout") from error
        raise UserError(f"{name!r} is no topology of libtpu, {EXAMPLES} ({first})") from error
    kind = devices[0].device_kind
    if not kind.startswith(tuple(CHIPS)):
        raise UserError(f"{name!r} is of {kind}, of which nothing is known here; there are v5e, v5p, v6e and tpu7x")
    return devices


def slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def extent(devices: list[Any]) -> tuple[int, ...]:
    """The size of each dimension of a slice's torus."""
    return tuple(1 + max(position) for position in zip(*(device.coords for device in devices), strict=True))
