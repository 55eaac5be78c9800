"""Routed experts spread over the devices of the "expert" axis: tokens travel to their experts and back.

    y = sum_k w_k SwiGLU(x; expert e_k),  device j holding experts j E/J .. (j+1) E/J - 1

A device sorts its assignments by expert, hence by the device that holds it, and sends them in rounds of at most q rows
to each device. q is a little more than a balanced routing needs, so buffers have one size whatever the routing, a
balanced batch takes one round, and if every token chose the same device's experts, it would take J: nothing is dropped.
The rounds end when the last device of the mesh has sent everything.

Backward, the tokens travel again, with their gradients, and the experts' hidden values are computed again: nothing of a
round is kept. Weights whose other axes are split too ("fsdp", "tensor") are gathered over "fsdp" in the dtype of the
computation, and their gradients reduced in f32 on the way back; over "tensor", every device computes its part of F.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.layers.dispatch import Order, combine, sort_assignments, sum_copies
from kimi_jax.layers.experts import FASTEST
from kimi_jax.sharding.exchange import EXCHANGES, Exchange, padded
from kimi_jax.sharding.mesh import AXES, TOKENS

HEADROOM = 1.25  # of q over a balanced routing's rows
FSDP_AXIS = {"gate": 1, "up": 1, "down": 2}  # which axis of an expert stack is the model dimension
SPECS = {
    "gate": PartitionSpec("expert", "fsdp", "tensor"),
    "up": PartitionSpec("expert", "fsdp", "tensor"),
    "down": PartitionSpec("expert", "tensor", "fsdp"),
}


def expert_parallel(mesh: Mesh, exchange: str = "padded") -> Callable:
    """What takes the place of ``layers.experts.run`` on ``mesh``, with a way of ``EXCHANGES`` to send rows."""

    def run(p: Params, cfg: ModelConfig, x_BTD: Array, weights_BTK: Array, experts_BTK: Array) -> Array:
        local = jax.shard_map(
            partial(_local, EXCHANGES[exchange], cfg.n_routed_experts, mesh.shape["expert"]),
            mesh=mesh,
            in_specs=({name: SPECS[name] for name in p}, TOKENS, TOKENS, TOKENS),
            out_specs=TOKENS,
            check_vma=False,
        )
        return local(p, x_BTD, weights_BTK, experts_BTK)

    return run


class Rounds(NamedTuple):
    """Which of a device's sorted assignments travel in which round: at most q to each of the J devices."""

    order: Order
    expert_A: Array  # the expert of every sorted assignment
    start_J: Array  # the first sorted assignment for each device
    rows_J: Array  # how many there are for it
    q: int
    count: Array  # rounds until the last device of the mesh is done

    def places(self, r: Array) -> tuple[Array, Array]:
        """The sorted assignments of round r, [J, q], and which of the places hold one."""
        i_Jq = r * self.q + jnp.arange(self.q) + jnp.zeros_like(self.rows_J)[:, None]
        own_Jq = i_Jq < self.rows_J[:, None]
        return jnp.minimum(self.start_J[:, None] + i_Jq, self.expert_A.size - 1), own_Jq

    def sent(self, r: Array) -> Array:
        return jnp.clip(self.rows_J - r * self.q, 0, self.q)


def _rounds(experts_MK: Array, E: int, J: int) -> Rounds:
    order = sort_assignments(experts_MK, E)
    A = experts_MK.size
    rows_J = jnp.sum(order.sizes_E.reshape(J, -1), axis=1)
    q = min(A, 8 * math.ceil(HEADROOM * A / (8 * J)))
    count = lax.pmax(jnp.max(-(-rows_J // q)), AXES)  # a permutation is one program of all devices
    return Rounds(order, experts_MK.reshape(-1)[order.order_A], jnp.cumsum(rows_J) - rows_J, rows_J, q, count)


class Travel(NamedTuple):
    """One round: which sorted assignments go where, and the local expert of every row that arrives (E / J: no row)."""

    exchange: Exchange
    places_Jq: Array
    own_Jq: Array
    sent_J: Array
    arriving_J: Array
    experts_R1: Array

    def there(self, rows_Jq: Array) -> Array:
        """Rows in their places here to R = J q rows with their experts."""
        arrived = self.exchange(rows_Jq, self.sent_J, "expert")
        return arrived.reshape(-1, *rows_Jq.shape[2:])

    def back(self, into_A: Array, rows_R: Array) -> Array:
        """Results with the experts to ``into``, in sorted order, here."""
        rows_Jq = self.exchange(rows_R.reshape(*self.own_Jq.shape, -1), self.arriving_J, "expert")
        at_Jq = jnp.where(self.own_Jq, self.places_Jq, into_A.shape[0])  # past the end: dropped
        return into_A.at[at_Jq].set(rows_Jq, mode="drop")


def _travel(exchange: Exchange, rounds: Rounds, r: Array, experts_per_device: int) -> Travel:
    places_Jq, own_Jq = rounds.places(r)
    sent_J = rounds.sent(r)
    expert_Jq = jnp.where(own_Jq, rounds.expert_A[places_Jq] % experts_per_device, experts_per_device)
    arriving_J = lax.all_to_all(sent_J, "expert", 0, 0, tiled=True)
    return Travel(exchange, places_Jq, own_Jq, sent_J, arriving_J, padded(expert_Jq, sent_J, "expert").reshape(-1, 1))


def _gathered(p: Params, dtype) -> Params:
    return {name: lax.all_gather(w.astype(dtype), "fsdp", axis=FSDP_AXIS[name], tiled=True) for name, w in p.items()}


def _local(
    exchange: Exchange, E: int, J: int, p: Params, x_BTD: Array, weights_BTK: Array, experts_BTK: Array
) -> Array:
    """The same for the tokens of one device and its part of the experts' weights."""
    D, K = x_BTD.shape[-1], experts_BTK.shape[-1]
    x_MD, weights_MK, experts_MK = x_BTD.reshape(-1, D), weights_BTK.reshape(-1, K), experts_BTK.reshape(-1, K)
    y_MD = _experts(exchange, E, J, p, x_MD, weights_MK, experts_MK)
    return lax.psum(y_MD, "tensor").astype(x_BTD.dtype).reshape(x_BTD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _experts(exchange: Exchange, E: int, J: int, p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """y [M, D] in f32: with "tensor", the part of it that this device's slice of F gives."""
    (M, K), D, dtype = experts_MK.shape, x_MD.shape[1], x_MD.dtype
    w, rounds = _gathered(p, dtype), _rounds(experts_MK, E, J)
    token_A = rounds.order.order_A // K

    def one(r: Array, y_AD: Array) -> Array:
        travel = _travel(exchange, rounds, r, E // J)
        x_RD = travel.there(x_MD[token_A[travel.places_Jq]])
        y_RD, _ = FASTEST.forward(w, x_RD, jnp.ones(travel.experts_R1.shape, jnp.float32), travel.experts_R1)
        return travel.back(y_AD, y_RD)

    y_AD = lax.fori_loop(0, rounds.count, one, jnp.zeros((M * K, D), dtype))
    return combine(y_AD[rounds.order.inverse_MK], weights_MK)


def _forward(exchange: Exchange, E: int, J: int, p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array):
    return _experts(exchange, E, J, p, x_MD, weights_MK, experts_MK), (p, x_MD, weights_MK, experts_MK)


def _backward(exchange: Exchange, E: int, J: int, residuals, dy_MD: Array):
    p, x_MD, weights_MK, experts_MK = residuals
    (M, K), D, dtype = experts_MK.shape, x_MD.shape[1], x_MD.dtype
    w, rounds, dy_MD = _gathered(p, dtype), _rounds(experts_MK, E, J), dy_MD.astype(dtype)
    token_A, weight_A1 = rounds.order.order_A // K, weights_MK.reshape(-1, 1)[rounds.order.order_A]

    def one(r: Array, total):
        dx_AD, dweight_A1, dw = total
        travel = _travel(exchange, rounds, r, E // J)
        token_Jq = token_A[travel.places_Jq]
        x_RD, dy_RD = travel.there(x_MD[token_Jq]), travel.there(dy_MD[token_Jq])
        weight_R1 = travel.there(weight_A1[travel.places_Jq])
        _, hidden = FASTEST.forward(w, x_RD, weight_R1, travel.experts_R1)
        new, dx_RD, dweight_R1 = FASTEST.backward(w, x_RD, weight_R1, hidden, dy_RD)
        return travel.back(dx_AD, dx_RD), travel.back(dweight_A1, dweight_R1), jax.tree.map(jnp.add, dw, new)

    nothing = (
        jnp.zeros((M * K, D), dtype),
        jnp.zeros((M * K, 1), jnp.float32),
        {name: jnp.zeros(w[name].shape, jnp.float32) for name in w},
    )
    dx_AD, dweight_A1, dw = lax.fori_loop(0, rounds.count, one, nothing)
    dp = {name: _scattered(dw[name], FSDP_AXIS[name]).astype(p[name].dtype) for name in p}
    return dp, sum_copies(dx_AD, rounds.order).astype(dtype), dweight_A1[rounds.order.inverse_MK, 0], None


def _scattered(dw: Array, axis: int) -> Array:
    return lax.psum_scatter(dw, "fsdp", scatter_dimension=axis, tiled=True)


_experts.defvjp(_forward, _backward)
