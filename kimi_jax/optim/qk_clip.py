"""QK-Clip: after a step, shrink the query and key weights of heads whose logits grew past a threshold.

    g = min(1, tau / S_h);   query_nope, key_nope *= sqrt(g);   query_rope *= g

(Kimi K2 report, arXiv 2507.20534, section 2.1.) Both products of the logit, nope.nope and rope.rope, then scale by g.
The shared rotary key and the values are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.dims import HEADS, LAYERS, Array, Fused, is_axes

SCALES: Mapping[str, Callable[[Array], Array]] = {"nope": jnp.sqrt, "rope": lambda g: g}  # by part; others stay


class Clipped(NamedTuple):
    """One leaf with per-head query or key weights: the rows of ``max_logits`` it answers to, and its axes."""

    first: int
    n_layers: int
    stacked: bool
    heads_axis: int
    parts: tuple[tuple[str, int], ...]


def clipped_leaves(axes: Any, params: Any) -> tuple[dict[str, Clipped], tuple[int, int]]:
    """Which leaves QK-Clip acts on, by path, and the shape [L, N] of ``max_logits``.

    A leaf counts if its axes end with HEADS and a ``Fused`` axis that has a part named in SCALES. Leaves with the
    same parent belong to the same attention layers. Rows follow the order in which the parents occur in the tree.
    """
    found: dict[str, Clipped] = {}
    rows: dict[str, tuple[int, int]] = {}
    total = heads = 0
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
    for (path, names), (_, leaf) in zip(leaves, jax.tree_util.tree_leaves_with_path(params), strict=True):
        last = names[-1] if names else None
        if len(names) < 2 or names[-2] != HEADS or not isinstance(last, Fused):
            continue
        if not any(part in SCALES for part, _ in last.parts):
            continue
        parent, stacked = jax.tree_util.keystr(path[:-1]), names[0] == LAYERS
        n_layers = leaf.shape[0] if stacked else 1
        if parent not in rows:
            rows[parent] = (total, n_layers)
            total += n_layers
        if rows[parent][1] != n_layers or (heads and heads != leaf.shape[-2]):
            raise ValueError(f"{jax.tree_util.keystr(path)}: number of layers or heads differs from its siblings'")
        heads = leaf.shape[-2]
        found[jax.tree_util.keystr(path)] = Clipped(rows[parent][0], n_layers, stacked, leaf.ndim - 2, last.parts)
    return found, (total, heads)


def clip_factors(max_logits_LN: Array, tau: float) -> Array:
    """g = min(1, tau / S), exactly 1 where S <= tau, and 1 where S is not finite: such a step is not to be repaired."""
    over_LN = jnp.isfinite(max_logits_LN) & (max_logits_LN > tau)
    return jnp.where(over_LN, tau / jnp.where(over_LN, max_logits_LN, 1.0), 1.0)


def scaled_update(update: Array, param: Array, g_LN: Array, leaf: Clipped) -> Array:
    """The update that also applies the clip: (p + u) s - p for clipped heads, ``u`` itself, bit for bit, elsewhere."""
    g_LN = g_LN[leaf.first : leaf.first + leaf.n_layers]
    of_parts = [(SCALES.get(name, jnp.ones_like)(g_LN), size) for name, size in leaf.parts]
    scale_LNX = jnp.concatenate([jnp.broadcast_to(s[..., None], (*s.shape, size)) for s, size in of_parts], axis=-1)
    between = param.ndim - 2 - leaf.stacked
    lead = (leaf.n_layers,) if leaf.stacked else ()
    scale = scale_LNX.reshape(*lead, *(1,) * between, *scale_LNX.shape[1:])
    touched = (scale != 1.0).astype(bool)
    moved = (param.astype(jnp.float32) + update) * scale - param.astype(jnp.float32)
    return jnp.where(touched, moved, update).astype(update.dtype)


def check_shape(max_logits: Array | None, expected: tuple[int, int]) -> Array:
    if max_logits is None:
        raise ValueError("QK-Clip needs update(..., max_logits=S) with S [layers, heads]; tau=None turns it off")
    if tuple(max_logits.shape) != expected:
        raise ValueError(f"max_logits has shape {tuple(max_logits.shape)}, expected [layers, heads] = {expected}")
    return max_logits.astype(jnp.float32)


def largest(first: Array, *others: Array) -> Array:
    """The maxima over several microbatches: elementwise, per layer and head; never a sum."""
    for other in others:
        first = jnp.maximum(first, other)
    return first
