"""Rows from every device of a mesh axis to every other one: three ways, one contract.

    received_JqX = exchange(rows_JqX, counts_J, axis)

``rows`` [J, q, X]: q places for each of the J devices of the axis; the first ``counts[j]`` hold rows for device j.
``received`` [J, q, X]: place j holds what device j sent here; beyond its count stands anything. For ``shard_map``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array

Exchange = Callable[[Array, Array, str], Array]


def padded(rows_JqX: Array, counts_J: Array, axis: str) -> Array:
    """``all_to_all`` of all places, full or not: everywhere, for the bytes of the places."""
    return lax.all_to_all(rows_JqX, axis, 0, 0)


def ragged(rows_JqX: Array, counts_J: Array, axis: str) -> Array:
    """``ragged_all_to_all``, which sends the rows alone: v5p, v6e and tpu7x; not v5e, not XLA:CPU."""
    J, q, *rest = rows_JqX.shape
    here = lax.axis_index(axis).astype(jnp.int32)
    received = lax.ragged_all_to_all(
        rows_JqX.reshape(J * q, *rest),
        jnp.zeros((J * q, *rest), rows_JqX.dtype),
        q * jnp.arange(J, dtype=jnp.int32),
        counts_J,
        jnp.full(J, q * here, jnp.int32),
        lax.all_to_all(counts_J, axis, 0, 0, tiled=True),
        axis_name=axis,
    )
    return received.reshape(rows_JqX.shape)


def ring(rows_JqX: Array, counts_J: Array, axis: str) -> Array:
    """J - 1 permutations of one place each, neighbours first: for an axis whose devices form a ring."""
    J = rows_JqX.shape[0]
    here = lax.axis_index(axis)
    received = jnp.zeros_like(rows_JqX).at[here].set(rows_JqX[here])
    for distance in range(1, J):
        pairs = [(j, (j + distance) % J) for j in range(J)]
        arriving = lax.ppermute(rows_JqX[(here + distance) % J], axis, pairs)
        received = received.at[(here - distance) % J].set(arriving)
    return received


EXCHANGES: dict[str, Exchange] = {"padded": padded, "ragged": ragged, "ring": ring}


def exchange_for(device: Any) -> str:
    """The best way to send rows on such a device: v5e's links and XLA:CPU have no ragged exchange."""
    return "padded" if device.platform == "cpu" or device.device_kind in ("TPU v5 lite", "TPU v5e") else "ragged"
