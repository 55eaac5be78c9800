"""Rows on their way to the experts of other devices and back: three ways, one contract.

The devices of the "expert" axis have rows, sorted by expert and so by the device that holds it, and know of each other
how many rows go to which expert. They travel in rounds, in buffers of R rows whatever the routing:

    journey = WAYS[name].begin(counts, R, r)      round r, in ``shard_map``
    arrived_RX = journey.there(rows_AX)           rows for the experts here; where no expert, anything
    rows_AX = journey.back(results_RX, rows_AX)   results of this round's rows, in their places

``ragged`` sends the rows alone and fills the buffer with whatever arrives; ``padded`` and ``ring`` have R / J places
for each pair of the J devices, and send them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array
from kimi_jax.sharding.mesh import AXES

AXIS = "expert"


class Counts(NamedTuple):
    """Who has how many rows for which expert; I and J are the devices of the axis as senders and as receivers."""

    expert_IE: Array
    device_IJ: Array
    start_IJ: Array  # where sender i's rows for receiver j begin

    @property
    def here_Ie(self) -> Array:
        """Rows for each expert of this device."""
        n_devices, E = self.expert_IE.shape
        own = E // n_devices
        return lax.dynamic_slice_in_dim(self.expert_IE, lax.axis_index(AXIS) * own, own, axis=1)


def counts(own_E: Array) -> Counts:
    """Everybody's counts from one's own."""
    expert_IE = lax.all_gather(own_E, AXIS)
    device_IJ = expert_IE.reshape(len(expert_IE), len(expert_IE), -1).sum(axis=2)
    return Counts(expert_IE, device_IJ, jnp.cumsum(device_IJ, axis=1) - device_IJ)


class Journey(Protocol):
    @property
    def experts_R(self) -> Array: ...  # of every row that arrives, counted on its device; E / J where there is no row

    def there(self, rows_AX: Array) -> Array: ...

    def back(self, results_RX: Array, rows_AX: Array) -> Array: ...


class Way(NamedTuple):
    begin: Callable[[Counts, int, Any], Journey]  # counts, R, r
    buffer: Callable[
        [int, int], int
    ]  # R for A assignments per device and J devices: a balanced routing takes one round
    rounds: Callable[[Counts, int], Array]  # until the busiest device has everything
    together: tuple[str, ...] = AXES[1:]  # along these axes all take equally many rounds


class Windows(NamedTuple):
    """Round r of ``ragged``: the rows r R .. (r + 1) R - 1 of all that a receiver gets, in the order of the senders."""

    experts_R: Array
    first_IJ: Array  # of the rows that i sends to j: which they are at i,
    size_IJ: Array  # how many,
    place_IJ: Array  # and where they stand at j

    def there(self, rows_AX: Array) -> Array:
        room_RX = lax.empty((self.experts_R.size, *rows_AX.shape[1:]), rows_AX.dtype)
        return self._send(rows_AX, room_RX, self.first_IJ, self.size_IJ, self.place_IJ)

    def back(self, results_RX: Array, rows_AX: Array) -> Array:
        return self._send(results_RX, rows_AX, self.place_IJ.T, self.size_IJ.T, self.first_IJ.T)

    def _send(self, rows: Array, into: Array, from_IJ: Array, size_IJ: Array, to_IJ: Array) -> Array:
        here = lax.axis_index(AXIS)
        return lax.ragged_all_to_all(
            rows, into, from_IJ[here], size_IJ[here], to_IJ[here], size_IJ[:, here], axis_name=AXIS
        )


def _windows(counts: Counts, R: int, r: Array) -> Windows:
    n_IJ = counts.device_IJ
    before_IJ = jnp.cumsum(n_IJ, axis=0) - n_IJ
    low_IJ, high_IJ = (jnp.clip(edge * R - before_IJ, 0, n_IJ) for edge in (r, r + 1))
    ends_X = jnp.cumsum(counts.here_Ie.reshape(-1))
    row_R = r * R + jnp.arange(R)
    expert_R = jnp.searchsorted(ends_X, row_R, side="right", method="compare_all") % counts.here_Ie.shape[1]
    return Windows(
        jnp.where(row_R < ends_X[-1], expert_R, counts.here_Ie.shape[1]),
        counts.start_IJ + low_IJ,
        high_IJ - low_IJ,
        jnp.clip(before_IJ + low_IJ - r * R, 0, R),
    )


class Places(NamedTuple):
    """Round r of ``padded`` and ``ring``: the rows r q .. (r + 1) q - 1 of every pair, q = R / J."""

    exchange: Callable[[Array], Array]
    experts_R: Array
    row_Jq: Array  # which rows here go to the places of each device; A: none

    def there(self, rows_AX: Array) -> Array:
        arrived_IqX = self.exchange(rows_AX.at[self.row_Jq].get(mode="clip"))
        return arrived_IqX.reshape(-1, *rows_AX.shape[1:])

    def back(self, results_RX: Array, rows_AX: Array) -> Array:
        results_JqX = self.exchange(results_RX.reshape(*self.row_Jq.shape, *results_RX.shape[1:]))
        return rows_AX.at[self.row_Jq].set(results_JqX, mode="drop")


def _places(exchange: Callable[[Array], Array]) -> Callable[[Counts, int, Array], Places]:
    def begin(counts: Counts, R: int, r: Array) -> Places:
        here, A = lax.axis_index(AXIS), jnp.sum(counts.device_IJ, axis=1)
        place_q = r * (R // len(counts.device_IJ)) + jnp.arange(R // len(counts.device_IJ))
        row_Jq = counts.start_IJ[here][:, None] + place_q
        own_Jq = place_q < counts.device_IJ[here][:, None]
        ends_Ie = jnp.cumsum(counts.here_Ie, axis=1)
        expert_Iq = jnp.sum(ends_Ie[:, None, :] <= place_q[None, :, None], axis=2)
        return Places(exchange, expert_Iq.reshape(-1), jnp.where(own_Jq, row_Jq, A[here]))

    return begin


def _all_places(rows_JqX: Array) -> Array:
    return lax.all_to_all(rows_JqX, AXIS, 0, 0)


def _around(rows_JqX: Array) -> Array:
    """J - 1 permutations of one place each, neighbours first."""
    J, here = len(rows_JqX), lax.axis_index(AXIS)
    received = jnp.zeros_like(rows_JqX).at[here].set(rows_JqX[here])
    for distance in range(1, J):
        pairs = [(j, (j + distance) % J) for j in range(J)]
        arriving = lax.ppermute(rows_JqX[(here + distance) % J], AXIS, pairs)
        received = received.at[(here - distance) % J].set(arriving)
    return received


def _window_rows(A: int, J: int) -> int:
    return min(128 * math.ceil(1.0625 * A / 128), A * J)


def _place_rows(A: int, J: int) -> int:
    return J * min(8 * math.ceil(1.25 * A / (8 * J)), A)


def _window_rounds(counts: Counts, R: int) -> Array:
    return jnp.max(-(-jnp.sum(counts.device_IJ, axis=0) // R))


def _place_rounds(counts: Counts, R: int) -> Array:
    return jnp.max(-(-counts.device_IJ // (R // len(counts.device_IJ))))


WAYS: dict[str, Way] = {
    "padded": Way(_places(_all_places), _place_rows, _place_rounds),  # everywhere
    "ragged": Way(_windows, _window_rows, _window_rounds),  # v5p, v6e and tpu7x; not v5e, not XLA:CPU
    # Where the devices of the axis form a ring. A permutation is one program of all devices: all are in it together.
    "ring": Way(_places(_around), _place_rows, _place_rounds, AXES),
}


def way_for(device: Any) -> str:
    """The best way to send rows on such a device: v5e's links and XLA:CPU have no ragged exchange."""
    return "padded" if device.platform == "cpu" or device.device_kind in ("TPU v5 lite", "TPU v5e") else "ragged"
