"""Cross-entropy with a head that no device holds whole.

    loss = sum_t weight_t (log sum_v exp(z_tv) - z_t,target),    z = x W_head

W_head [D, V] lies split over "fsdp", "context" and "expert" (or some of them) along D and over "tensor" along V. Each
device takes its own tokens through the vocabulary chunk by chunk: a chunk of the head is gathered along D, its logits
raise the running maximum and sum. A second pass forms the logits again, and the gradients of ``x`` and of the chunk,
reduced to where it lies.
Neither the head nor the logits are ever whole anywhere; the price is a fourth product to the usual three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kimi_jax.dims import VOCAB, Array
from kimi_jax.layers.linear import product, weight_gradient
from kimi_jax.sharding.mesh import batch_axes, tokens
from kimi_jax.sharding.rules import TRAIN, split

Axes = tuple[str, ...]

WHOLE = PartitionSpec()
CHUNK_ELEMENTS = 2**25  # logits held at once, at most


def vocab_parallel(mesh: Mesh | AbstractMesh) -> Callable[[Array, Array, Array, Array], Array]:
    """What takes the place of ``training.loss.cross_entropy`` on ``mesh``."""
    of_tokens = tokens(mesh)
    over_tokens = (*batch_axes(mesh), "context")

    def spread(f: Callable, head_DV: Array, out_specs: Callable) -> Callable:
        over_D = split(head_DV.shape[0], TRAIN["embed"], mesh)
        head = PartitionSpec(over_D, TRAIN[VOCAB])
        in_specs = (of_tokens, head, of_tokens, of_tokens)
        local = partial(f, over_D, over_tokens)
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs(head), check_vma=False)

    @jax.custom_vjp
    def cross_entropy(x_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array) -> Array:
        loss = spread(lambda *args: _loss(*args)[0], head_DV, lambda head: WHOLE)
        return loss(x_BTD, head_DV, targets_BT, weights_BT)

    def forward(x_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array):
        loss_and_gradients = spread(_loss_and_gradients, head_DV, lambda head: (WHOLE, of_tokens, head))
        total, dx_BTD, dhead_DV = loss_and_gradients(x_BTD, head_DV, targets_BT, weights_BT)
        return total, (dx_BTD, dhead_DV)

    def backward(gradients, scale: Array):
        return *((scale * g.astype(jnp.float32)).astype(g.dtype) for g in gradients), None, None

    cross_entropy.defvjp(forward, backward)
    return cross_entropy


def _width(n_tokens: int, V: int) -> int:
    """Words of a chunk, whose logits have to fit: as many as divide V or, if that halves the chunk, as many as fit."""
    most = min(V, max(1, CHUNK_ELEMENTS // n_tokens))
    return next((width for width in range(most, most // 2, -1) if V % width == 0), most)


def _by_chunks(step: Callable, running: Any, n_tokens: int, V: int) -> tuple[Any, Any]:
    """``step(width, running, at)`` in chunks of one width and what is left; what it finds in each, joined along V."""
    width = _width(n_tokens, V)
    n, rest = divmod(V, width)
    running, found = lax.scan(lambda running, chunk: step(width, running, chunk * width), running, jnp.arange(n))
    found = jax.tree.map(lambda a_nDV: jnp.moveaxis(a_nDV, 0, 1).reshape(-1, n * width), found)
    if rest:
        running, last = step(rest, running, n * width)
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), found, last)
    return running, found


def _logits(over_D: Axes, x_MD: Array, head_DV: Array, width: int, at: Array | int) -> tuple[Array, Array, Array]:
    """The logits of one chunk of this device's vocabulary, the head's chunk, and the first word of it."""
    part = lax.dynamic_slice_in_dim(head_DV, at, width, axis=1).astype(x_MD.dtype)
    whole_DV = lax.all_gather(part, over_D, axis=0, tiled=True)
    return product("MD,DV->MV", x_MD, whole_DV), whole_DV, lax.axis_index("tensor") * head_DV.shape[1] + at


def _loss(
    over_D: Axes, over_tokens: Axes, x_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array
) -> tuple[Array, Array]:
    """The loss of all tokens, and log sum exp of this device's own."""
    x_MD, targets_M, weights_M = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1)

    def step(width: int, running: tuple[Array, Array, Array], at: Array | int):
        max_M, sum_M, target_M = running
        logits_MV, _, first = _logits(over_D, x_MD, head_DV, width, at)
        new_max_M = jnp.maximum(max_M, jnp.max(logits_MV, axis=1))
        sum_M = sum_M * jnp.exp(max_M - new_max_M) + jnp.sum(jnp.exp(logits_MV - new_max_M[:, None]), axis=1)
        column_M = targets_M - first
        inside_M = (column_M >= 0) & (column_M < logits_MV.shape[1])
        found_M = jnp.take_along_axis(logits_MV, jnp.where(inside_M, column_M, 0)[:, None], axis=1)[:, 0]
        return (new_max_M, sum_M, target_M + jnp.where(inside_M, found_M, 0)), None

    zeros_M = jnp.zeros(targets_M.shape, jnp.float32)
    start = zeros_M - jnp.inf, zeros_M, zeros_M
    (max_M, sum_M, target_M), _ = _by_chunks(step, start, targets_M.size, head_DV.shape[1])
    overall_M = lax.pmax(max_M, "tensor")
    lse_M = overall_M + jnp.log(lax.psum(sum_M * jnp.exp(max_M - overall_M), "tensor"))
    each_M = weights_M * (lse_M - lax.psum(target_M, "tensor"))
    return lax.psum(jnp.sum(jnp.where(weights_M != 0, each_M, 0)), over_tokens), lse_M


def _loss_and_gradients(
    over_D: Axes, over_tokens: Axes, x_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array
):
    total, lse_M = _loss(over_D, over_tokens, x_BTD, head_DV, targets_BT, weights_BT)
    x_MD, targets_M, weights_M1 = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1), weights_BT.reshape(-1, 1)

    def step(width: int, dx_MD: Array, at: Array | int):
        logits_MV, whole_DV, first = _logits(over_D, x_MD, head_DV, width, at)
        hit_MV = first + jnp.arange(logits_MV.shape[1]) == targets_M[:, None]
        dlogits_MV = weights_M1 * (jnp.exp(logits_MV - lse_M[:, None]) - hit_MV)
        dlogits_MV = jnp.where(weights_M1 != 0, dlogits_MV, 0).astype(x_MD.dtype)
        dhead_DV = weight_gradient("MD,MV->DV", x_MD, dlogits_MV)
        dhead_DV = lax.psum_scatter(dhead_DV, over_D, scatter_dimension=0, tiled=True)
        return dx_MD + product("MV,DV->MD", dlogits_MV, whole_DV), dhead_DV

    start_MD = jnp.zeros(x_MD.shape, jnp.float32)
    dx_MD, dhead_DV = _by_chunks(step, start_MD, targets_M.size, head_DV.shape[1])
    dx_BTD = lax.psum(dx_MD, "tensor").astype(x_BTD.dtype).reshape(x_BTD.shape)
    others = tuple(axis for axis in over_tokens if axis not in over_D)
    return total, dx_BTD, lax.psum(dhead_DV, others).astype(head_DV.dtype)
