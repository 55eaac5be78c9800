"""Experts spread over the devices of the "expert" axis: tokens travel to their experts and back.

    y = sum_k w_k SwiGLU(x; expert e_k) + SwiGLU(x; shared expert)

Device j holds the routed experts j E/J .. (j+1) E/J - 1.

A device sorts its assignments by expert, hence by the device that holds it, and sends them in rounds, in buffers of one
size whatever the routing (``exchange``): a balanced batch takes one round, and if every token chose the same device's
experts, it would take as many as there are devices: nothing is dropped. The rounds end when the last device of the mesh
has sent everything. The tokens of a device are taken in chunks, so that memory does not grow with their number either;
forward in pairs of chunks, so that rows of one travel while those of the other are computed, and the last results
beside the shared expert.

Backward, the tokens travel again, with their gradients, and the experts' hidden values are computed again: nothing of a
round is kept. They travel beside the shared expert, and gradients of tokens back beside those of the weights.

The shared expert is computed in every round again: a balanced batch takes one (``shared_expert``).

Weights are gathered along the model dimension, in the dtype of the computation, and their gradients reduced in f32 on
the way back; over "tensor", every device computes its part of F.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params, is_spec
from kimi_jax.layers.dispatch import Order, combine, sort_assignments, sum_copies
from kimi_jax.layers.experts import BLOCKED, Path, specs
from kimi_jax.sharding import shared_expert
from kimi_jax.sharding.exchange import WAYS, Counts, Way, counts
from kimi_jax.sharding.gathered import Pieces
from kimi_jax.sharding.mesh import tokens
from kimi_jax.sharding.parcel import packed
from kimi_jax.sharding.rules import TRAIN, partition
from kimi_jax.sharding.shared_expert import BACKWARD, FORWARD, at_once

TOKENS_AT_ONCE = 8192  # on a device: what travels and is computed at once, and so the memory it takes


def expert_parallel(
    mesh: Mesh | AbstractMesh, way: str = "padded", path: Path = BLOCKED, fp8: bool = False
) -> Callable:
    """What takes the place of ``layers.experts.run`` on ``mesh``: one of ``exchange.WAYS`` to send rows, and what
    multiplies them where they arrive.

    ``fp8``: tokens and gradients of outputs travel to the experts in eight bits (``fp8_rows``), results as they are.
    """

    def run(p: Params, cfg: ModelConfig, x_BTD: Array, weights_BTK: Array, experts_BTK: Array) -> Array:
        declared = specs(cfg)
        split = jax.tree.map(lambda spec: partition(spec, mesh, TRAIN), declared, is_leaf=is_spec)
        over_D = jax.tree.map(Pieces.of, declared, split, is_leaf=is_spec)
        local = jax.shard_map(
            partial(_local, _Spread(WAYS[way], path, fp8, over_D)),
            mesh=mesh,
            in_specs=(split, *(tokens(mesh),) * 3),
            out_specs=tokens(mesh),
            check_vma=False,
        )
        return local({name: p[name] for name in declared}, x_BTD, weights_BTK, experts_BTK)

    return run


class _Plan(NamedTuple):
    """The assignments of a chunk in order, everybody's counts, rows of a buffer, and the number of rounds."""

    order: Order
    everyones: Counts
    R: int
    n_rounds: Array  # the same everywhere


@dataclass(frozen=True, eq=False)
class _Spread:
    """How rows travel, and what is done with them where they arrive."""

    way: Way
    path: Path
    fp8: bool
    over_D: Any  # Pieces of every weight

    def gathered(self, p: Params, dtype: Any) -> Params:
        return jax.tree.map(lambda w, pieces: pieces.together(w.astype(dtype)), p, self.over_D)

    def scattered(self, dw: Params, p: Params) -> Params:
        """The gradients of the weights as they lie, from f32 gradients of the gathered ones."""
        return jax.tree.map(lambda dw, w, pieces: pieces.scattered(dw).astype(w.dtype), dw, p, self.over_D)

    def plan(self, experts_MK: Array, E: int) -> _Plan:
        order = sort_assignments(experts_MK, E)
        everyones = counts(order.sizes_E)
        R = self.way.buffer(experts_MK.size, len(everyones.device_IJ))
        return _Plan(order, everyones, R, lax.pmax(self.way.rounds(everyones, R), self.way.together))


def _local(spread: _Spread, p: Params, x_BTD: Array, weights_BTK: Array, experts_BTK: Array) -> Array:
    """The same for the tokens of one device and its part of the experts' weights."""
    D, K = x_BTD.shape[-1], experts_BTK.shape[-1]
    x_MD, weights_MK, experts_MK = x_BTD.reshape(-1, D), weights_BTK.reshape(-1, K), experts_BTK.reshape(-1, K)
    y_MD = _experts(spread, p, x_MD, weights_MK, experts_MK)
    return lax.psum(y_MD, "tensor").astype(x_BTD.dtype).reshape(x_BTD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(spread: _Spread, p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """y [M, D] in f32: with "tensor", the part of it that this device's slice of F gives."""
    w = spread.gathered(p, x_MD.dtype)
    tokens = _chunks(x_MD, weights_MK, experts_MK)
    pairs = [a.reshape(-1, 2 - len(a) % 2, *a.shape[1:]) for a in tokens]
    y_pcMD = lax.map(lambda chunks: _forward_chunks(spread, w, *chunks), pairs)
    return _joined(y_pcMD, len(x_MD))


def _chunks(*tokens: Array) -> list[Array]:
    """Arrays of M tokens in equal chunks of at most TOKENS_AT_ONCE, filled up with zeros if M has no divisor near."""
    M = len(tokens[0])
    fewest = -(-M // TOKENS_AT_ONCE)
    n = next((n for n in range(fewest, 2 * fewest) if M % n == 0), fewest)
    if M % n:
        tokens = tuple(jnp.pad(a, ((0, -M % n), (0, 0))) for a in tokens)
    return [a.reshape(n, -1, *a.shape[1:]) for a in tokens]


def _joined(a_cMX: Array, M: int) -> Array:
    """The first M tokens of chunks."""
    return a_cMX.reshape(-1, a_cMX.shape[-1])[:M]


def _forward_chunks(spread: _Spread, w: Params, x_cMD: Array, weights_cMK: Array, experts_cMK: Array) -> Array:
    """Of one chunk or two at a time: the second's rows are on their way when the first is computed."""
    (_, M, K), D, dtype, e = experts_cMK.shape, x_cMD.shape[2], x_cMD.dtype, len(w["experts"]["gate"])
    plans = [spread.plan(experts_MK, e * lax.axis_size("expert")) for experts_MK in experts_cMK]
    parcels = [packed(spread.fp8, x_MD).rows(plan.order.order_A // K) for plan, x_MD in zip(plans, x_cMD, strict=True)]

    def one(r: Array, y: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        y_cAD, shared_cMD = y
        journeys = [spread.way.begin(plan.everyones, plan.R, r) for plan in plans]
        x_cRD = []
        for parcel, journey in zip(parcels, journeys, strict=True):
            begins = "shared" in w and parcel is parcels[-1]  # in the compiler's schedule
            x_cRD += parcel.arrived(journey, e, at_once(FORWARD) if begins else nullcontext())[0]
        results = []
        for journey, x_RD, y_AD in zip(journeys, x_cRD, y_cAD, strict=True):
            ones_R1 = jnp.ones((len(x_RD), 1), jnp.float32)
            y_RD, _ = spread.path.forward(w["experts"], x_RD, ones_R1, journey.experts_R[:, None])
            results.append(journey.back(y_RD, y_AD))
        if "shared" not in w:
            return results, shared_cMD
        return results, shared_expert.forward(w["shared"], _now(r, x_cMD))

    n_rounds = reduce(jnp.maximum, [plan.n_rounds for plan in plans])
    start = [jnp.zeros((M * K, D), dtype) for _ in plans], jnp.zeros(x_cMD.shape, dtype)
    y_cAD, shared_cMD = lax.fori_loop(0, n_rounds, one, start)
    y_cMKD = [y_AD[plan.order.inverse_MK] for plan, y_AD in zip(plans, y_cAD, strict=True)]
    return jnp.stack(list(map(combine, y_cMKD, weights_cMK))) + shared_cMD


def _now(r: Array, x: Any) -> Any:
    """The same; but what is computed from it is computed in round r, and not before the loop."""
    return lax.optimization_barrier((x, r))[0]


def _forward(spread: _Spread, p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array):
    return _experts(spread, p, x_MD, weights_MK, experts_MK), (p, x_MD, weights_MK, experts_MK)


def _backward(spread: _Spread, residuals, dy_MD: Array):
    p, x_MD, weights_MK, experts_MK = residuals
    w = spread.gathered(p, x_MD.dtype)

    def chunk(dw: Params, tokens: list[Array]):
        dw, dx_MD, dweights_MK = _backward_chunk(spread, w, dw, *tokens)
        return dw, (dx_MD, dweights_MK)

    nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), w)
    tokens = _chunks(x_MD, weights_MK, experts_MK, dy_MD.astype(x_MD.dtype))
    dw, (dx_cMD, dweights_cMK) = lax.scan(chunk, nothing, tokens)
    return spread.scattered(dw, p), _joined(dx_cMD, len(x_MD)), _joined(dweights_cMK, len(x_MD)), None


def _backward_chunk(
    spread: _Spread, w: Params, dw: Params, x_MD: Array, weights_MK: Array, experts_MK: Array, dy_MD: Array
) -> tuple[Params, Array, Array]:
    """dw with what these tokens add to it, and the gradients of x and weights."""
    (M, K), D, dtype, e = experts_MK.shape, x_MD.shape[1], x_MD.dtype, len(w["experts"]["gate"])
    order, everyones, R, n_rounds = spread.plan(experts_MK, e * lax.axis_size("expert"))
    parcel = packed(spread.fp8, x_MD, dy_MD).rows(order.order_A // K, weights_MK.reshape(-1, 1)[order.order_A])

    def one(r: Array, total):
        dx_AD, dweight_A1, dw_so_far, dx_MD = total
        journey = spread.way.begin(everyones, R, r)
        (x_RD, dy_RD), weight_R1 = parcel.arrived(journey, e, at_once(BACKWARD) if "shared" in w else nullcontext())
        _, hidden = spread.path.forward(w["experts"], x_RD, weight_R1, journey.experts_R[:, None])
        new, dx_RD, dweight_R1 = spread.path.backward(w["experts"], x_RD, weight_R1, hidden, dy_RD)
        dx_RD, dweight_A1 = lax.optimization_barrier((dx_RD, journey.back(dweight_R1, dweight_A1)))
        dx_AD = journey.back(dx_RD, dx_AD)
        dw_so_far = dw_so_far | {"experts": jax.tree.map(jnp.add, dw_so_far["experts"], new)}
        if "shared" not in w:
            return dx_AD, dweight_A1, dw_so_far, dx_MD
        new, dx_MD = shared_expert.backward(w["shared"], *_now(r, (x_MD, dy_MD)))
        return dx_AD, dweight_A1, dw_so_far | {"shared": jax.tree.map(jnp.add, dw["shared"], new)}, dx_MD

    start = jnp.zeros((M * K, D), dtype), jnp.zeros((M * K, 1), jnp.float32), dw, jnp.zeros_like(x_MD)
    dx_AD, dweight_A1, dw, dx_MD = lax.fori_loop(0, n_rounds, one, start)
    return dw, (sum_copies(dx_AD, order) + dx_MD).astype(dtype), dweight_A1[order.inverse_MK, 0]


_experts.defvjp(_forward, _backward)
