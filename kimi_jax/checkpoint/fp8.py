"""Block-scaled fp8 weights: W[i, j] = e4m3(q[i, j]) * scale[i // 128, j // 128], exactly, in f32."""

from __future__ import annotations

import numpy as np

from kimi_jax.errors import UserError

BLOCK = (128, 128)


def grid(shape: tuple[int, int], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """The shape of the scales; the last block of a side may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantise(q: np.ndarray, scale: np.ndarray, name: str, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """The f32 weights of an fp8 matrix. ``name`` is for the message if the scales do not fit or are not finite."""
    if q.ndim != 2 or scale.shape != grid(q.shape, block):
        expected = grid(q.shape, block) if q.ndim == 2 else "a matrix"
        raise UserError(f"{name}: scales have shape {scale.shape}, expected {expected} for weights {q.shape}")
    scale = scale.astype(np.float32)
    if not np.isfinite(scale).all():
        raise UserError(f"{name}: the block scales hold NaN or infinity; the file is damaged")
    weights = q.astype(np.float32)
    with np.errstate(over="ignore"):  # an overflow is found with the other non-finite weights
        for i, row in enumerate(scale):
            rows = weights[i * block[0] : (i + 1) * block[0]]
            rows *= np.repeat(row, block[1])[: q.shape[1]]
    return weights
