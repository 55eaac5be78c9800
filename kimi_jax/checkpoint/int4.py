"""Group-scaled int4 weights, as compressed-tensors "pack-quantized" stores Kimi-K2-Thinking and its successors.

W[i, j] = (n[i, j] - 8) * scale[i, j // 32], with n an unsigned nibble: symmetric, the zero point is always 8. Eight
neighbours of a row share an int32, the first in its lowest bits; a row is filled up to a whole int32.
"""

from __future__ import annotations

import numpy as np

from kimi_jax.errors import UserError

GROUP = 32
SUFFIXES = ("_packed", "_scale", "_shape")  # that stand for one weight, after its name


def dequantise(packed: np.ndarray, scale: np.ndarray, width: int, name: str, group: int = GROUP) -> np.ndarray:
    """The f32 weights [out, width] of an int4 matrix; exact if the scales are bf16 or f16.

    ``packed`` [out, ceil(width / 8)] int32, ``scale`` [out, ceil(width / group)] of any float type. ``name`` is for the
    message if the scales are not finite.
    """
    scale = scale.astype(np.float32)
    if not np.isfinite(scale).all():
        raise UserError(f"{name}: the group scales hold NaN or infinity; the file is damaged")
    weights = _unpack(packed)[:, :width].astype(np.float32)
    weights *= np.repeat(scale, group, axis=1)[:, :width]
    return weights


def _unpack(packed: np.ndarray) -> np.ndarray:
    """The int8 numbers -8..7 of int32 words, [out, 8 * words], the lower half of each byte before the upper."""
    pairs = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    numbers = np.empty((*pairs.shape, 2), np.uint8)
    np.bitwise_and(pairs, 15, out=numbers[..., 0])
    np.right_shift(pairs, 4, out=numbers[..., 1])
    return numbers.view(np.int8).reshape(len(packed), -1) - np.int8(8)
