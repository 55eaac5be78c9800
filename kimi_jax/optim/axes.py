"""From logical axis names to matrices: which leaves Muon takes, and how each is cut into a stack of matrices."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.dims import BUFFER, EXPERTS, HEADS, LAYERS, VOCAB, Array, Axes, Fused, is_axes

MATRIX, ELEMENTWISE, FROZEN = "matrix", "elementwise", "frozen"
STACKS = (LAYERS, EXPERTS)
NOT_HIDDEN = re.compile(r"(.*_)?(embed.*|bias|scale)|unembed.*|vocab.*|wte|wpe|head|(lm_|output_)head(_\d+)?")
WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where one begins in LMHead, TokenEmbedding


@dataclass(frozen=True)
class Layout:
    """How one leaf is optimised.

    ``stack``: number of leading axes that stack matrices. ``rows``: how many of the following axes form the rows of
    the matrix; the rest form its columns. ``parts``: sizes along the last axis of the matrices it is split into.
    ``axes``: the logical names, where they are known.
    """

    kind: str
    stack: int = 0
    rows: int = 1
    parts: tuple[int, ...] = ()
    axes: Axes = ()


def layouts(params: Any, axes: Any | None, split_fused: bool) -> Any:
    """The ``Layout`` of every leaf of ``params``; without ``axes``, from rank and name alone."""
    if axes is None:
        return jax.tree_util.tree_map_with_path(_by_name, params)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, names: _by_axes(jax.tree_util.keystr(path), leaf, names, split_fused),
        params,
        match(params, axes),
    )


def match(params: Any, axes: Any) -> Any:
    """``axes`` in the structure of ``params``, with every leaf checked against its parameter."""
    found = jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)[0]
    names = {_key(path): leaf for path, leaf in found}

    def look_up(path, leaf):
        key, shown = _key(path), jax.tree_util.keystr(path)
        if key not in names:
            raise ValueError(f"axes has no entry for parameter {shown}")
        if not is_axes(names[key]) or len(names[key]) != leaf.ndim:
            raise ValueError(f"axes of parameter {shown} are {names[key]!r}, but its shape is {leaf.shape}")
        return names.pop(key)

    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_empty)
    empty = [_key(path) for path, node in nodes if _empty(node)]
    matched = [look_up(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    left = ["".join(key) for key in names if not any(key[: len(start)] == start for start in empty)]
    if left:
        raise ValueError(f"axes names parameters that do not exist: {', '.join(left)}")
    return jax.tree.unflatten(jax.tree.structure(params), matched)


def _key(path) -> tuple[str, ...]:
    """The same for a parameter as it is and in one of Flax's boxes: ``nnx.Optimizer`` updates what it has unpacked."""
    boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return tuple(jax.tree_util.keystr((entry,)) for entry in (path[:-1] if boxed else path))


def _empty(node: Any) -> bool:
    """A part of the tree without parameters: None, or what ``optax.masked`` puts in the place of those it hides."""
    return node is None or isinstance(node, tuple) and not node


def _by_name(path, leaf) -> Layout:
    keys = re.findall(r"\w+", jax.tree_util.keystr(path))
    hidden = not any(NOT_HIDDEN.fullmatch(WORD.sub("_", key).lower()) for key in keys)
    return Layout(MATRIX) if leaf.ndim == 2 and leaf.size and hidden else Layout(ELEMENTWISE)


def _by_axes(path: str, leaf: Array, axes: Axes, split_fused: bool) -> Layout:
    if BUFFER in axes:
        return Layout(FROZEN)
    stack = next((i for i, axis in enumerate(axes) if axis not in STACKS), len(axes))
    inner = axes[stack:]
    sides = len(inner) - (HEADS in inner)
    if VOCAB in axes or sides < 2 or not leaf.size:
        return Layout(ELEMENTWISE)
    if any(axis in STACKS for axis in inner):
        raise ValueError(f"parameter {path}: stack axes must come first in {axes}")
    rows = 2 if inner[0] == HEADS else 1
    if sides != 2:
        raise ValueError(f"parameter {path}: {axes} does not name the two sides of a matrix")
    last = inner[-1]
    if isinstance(last, Fused) and last.size != leaf.shape[-1]:
        raise ValueError(f"parameter {path}: the parts of {last} do not add up to {leaf.shape[-1]}")
    parts = tuple(size for _, size in last.parts) if split_fused and isinstance(last, Fused) else ()
    return Layout(MATRIX, stack, rows, parts, axes)


def alike(layouts: list[Layout], leaves: list[Array]) -> list[tuple[Layout, list[int]]]:
    """Which leaves can be taken as one: those with one matrix a layer, of the same shape and with the same axes."""
    found: dict[Any, list[int]] = {}
    for i, (layout, leaf) in enumerate(zip(layouts, leaves, strict=True)):
        one_a_layer = layout.stack == 1 and layout.axes[:1] == (LAYERS,)
        found.setdefault((layout, leaf.shape[1:]) if one_a_layer else i, []).append(i)
    return [(layouts[members[0]], members) for members in found.values()]


def matrices(x: Array, layout: Layout) -> list[Array]:
    """The leaf as stacks of matrices [stack axes, n, m]: one stack, or one per part."""
    pieces = jnp.split(x, _cuts(layout), axis=-1) if layout.parts else [x]
    return [piece.reshape(*piece.shape[: layout.stack], *_sides(piece.shape, layout)) for piece in pieces]


def leaf(stacks: list[Array], shape: tuple[int, ...], layout: Layout) -> Array:
    """Puts back together what ``matrices`` took apart."""
    sizes = layout.parts or (shape[-1],)
    pieces = [stack.reshape(*shape[:-1], size) for stack, size in zip(stacks, sizes, strict=True)]
    return jnp.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]


def _cuts(layout: Layout) -> list[int]:
    return [sum(layout.parts[: i + 1]) for i in range(len(layout.parts) - 1)]


def _sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    split = layout.stack + layout.rows
    return math.prod(shape[layout.stack : split]), math.prod(shape[split:])
