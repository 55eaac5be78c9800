"""Weights in eight bits: W = values * scale, where a block of values shares a scale.

    fp8    e4m3 values, a scale for every 128 x 128 of a Hugging Face matrix, as Kimi-K2 was released
    int8   a scale for every output channel

``Quantized`` stands where a weight array stands: ``linear.contract`` casts it, and the compiler dequantises one layer's
matrix on its way into the product. Our layout gives heads an axis of their own, which blocks of the fused Hugging Face
axis need not respect; so may a shard of an axis be narrower than a block. ``reblocked`` then repeats scales for smaller
blocks, which changes no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.dims import Array


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("blocks",))
@dataclass(frozen=True, eq=False)
class Quantized:
    """``values`` in e4m3 or int8, and ``scale`` in f32, of the same rank: ceil(size / block) long on every axis.

    ``blocks`` counts from the last axis; axes before those it names have blocks of 1, so that a scan over layers or an
    index of an expert acts on values and scales alike. A block may be longer than its axis.
    """

    values: Array
    scale: Array
    blocks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def astype(self, dtype: Any) -> Array:
        """The weights: exact in f32, then rounded once.

        Spreading the scales over all values would write four bytes for each of them. So they are spread over the last
        axis alone, and the others are split into blocks, which moves nothing in memory.
        """
        leading = list(zip(blocks_of(self), self.shape, strict=True))[:-1]
        w = reblocked(self, (*(math.gcd(block, size) for block, size in leading), 1))
        split = [(n, size // n) if 1 < n < size else (size,) for n, size in zip(w.scale.shape, w.shape, strict=True)]
        ones = [(n, *(1,) * (len(parts) - 1)) for n, parts in zip(w.scale.shape, split, strict=True)]
        values = w.values.reshape(sum(split, ())).astype(jnp.float32)
        return (values * w.scale.reshape(sum(ones, ()))).astype(dtype).reshape(self.shape)


def blocks_of(w: Quantized) -> tuple[int, ...]:
    """Of every axis."""
    return ((1,) * w.ndim + w.blocks)[-w.ndim :]


def reblocked(w: Quantized, blocks: tuple[int, ...]) -> Quantized:
    """The same weights with smaller ``blocks`` of the last axes, each a divisor of what it is now.

    An axis with one scale for all of it keeps that.
    """
    scale, new = w.scale, ((1,) * w.ndim + blocks)[-w.ndim :]
    kept = list(blocks_of(w))
    for axis, (size, block) in enumerate(zip(w.shape, new, strict=True)):
        if scale.shape[axis] > 1 and block != kept[axis]:
            assert kept[axis] % block == 0, (w.blocks, blocks)
            scale = scale.repeat(kept[axis] // block, axis)[(slice(None),) * axis + (slice(-(-size // block)),)]
            kept[axis] = block
    return Quantized(w.values, scale, tuple(kept))
