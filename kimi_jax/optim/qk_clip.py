"""QK-Clip: after a step, shrink the query and key weights of heads whose logits grew past a threshold.

    g = min(1, tau / S_h);   query_nope, key_nope *= sqrt(g);   query_rope *= g

(Kimi K2 report, arXiv 2507.20534, section 2.1.) Both products of the logit, nope.nope and rope.rope, then scale by g.
The shared rotary key and the values are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.dims import HEADS, LAYERS, Array, Fused

SCALES: Mapping[str, Callable[[Array], Array]] = {"nope": jnp.sqrt, "rope": lambda g: g}  # by part; others stay
ALONE = ("kernel", "weight", "value")  # names of a projection's matrix, and of what Flax's boxes hold

Path = tuple[Any, ...]  # of ``jax.tree_util``


class Clipped(NamedTuple):
    """One leaf with per-head query or key weights: the rows of ``max_logits`` it answers to, and its axes."""

    first: int
    n_layers: int
    stacked: bool
    parts: tuple[tuple[str, int], ...]


def clipped_leaves(axes: Any, params: Any) -> tuple[dict[str, Clipped], tuple[int, int]]:
    """Which leaves QK-Clip acts on, by path, and the shape [L, N] of ``max_logits``.

    A leaf counts if its axes end with HEADS and a ``Fused`` axis that has a part named in SCALES. Leaves of the same
    module belong to the same attention layers. Rows follow the modules' paths, numbers in them by their value.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    of_module: dict[Path, list[tuple[Path, bool, Fused, Array]]] = {}
    for (path, leaf), names in zip(leaves, tree.flatten_up_to(axes), strict=True):
        last = names[-1] if names else None
        if len(names) < 2 or names[-2] != HEADS or not isinstance(last, Fused):
            continue
        if any(part in SCALES for part, _ in last.parts):
            of_module.setdefault(_module(path), []).append((path, names[0] == LAYERS, last, leaf))
    found: dict[str, Clipped] = {}
    total = heads = 0
    for module in sorted(of_module, key=_natural):
        expected = None
        for path, stacked, last, leaf in of_module[module]:
            n_layers, key = leaf.shape[0] if stacked else 1, jax.tree_util.keystr(path)
            if expected not in (None, n_layers) or heads not in (0, leaf.shape[-2]):
                raise ValueError(f"{key}: number of layers or heads differs from its siblings'")
            expected, heads = n_layers, leaf.shape[-2]
            found[key] = Clipped(total, n_layers, stacked, last.parts)
        total += expected or 0
    return found, (total, heads)


def _module(path: Path) -> Path:
    """Where the projections of an attention layer lie side by side: above the leaf and what it is alone in."""
    while len(path) > 1 and jax.tree_util.keystr(path[-1:], simple=True) in ALONE:
        path = path[:-1]
    return path[:-1]


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    pieces = re.findall(r"\d+|\D+", jax.tree_util.keystr(path, simple=True, separator="/"))
    return [(piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in pieces]


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
