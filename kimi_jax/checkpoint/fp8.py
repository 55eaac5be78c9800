"""Block-scaled fp8 weights: W[i, j] = e4m3(q[i, j]) * scale[i // 128, j // 128], exactly, in f32."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.errors import UserError

BLOCK = (128, 128)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
STRIP_ROWS = 16  # that are looked up at a time, so that the indices stay in the cache
LARGEST = 448.0  # that e4m3 holds

# numpy's own casts to and from e4m3 are several times slower, and run one thread at a time: look the values up.
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
with np.errstate(invalid="ignore"):
    _CODES = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(E4M3).view(np.uint8)


def grid(shape: tuple[int, int], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """The shape of the scales; the last block of a side may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantise(
    q: np.ndarray, scale: np.ndarray, name: str, block: tuple[int, int] = BLOCK, dtype: Any = np.float32
) -> np.ndarray:
    """The weights of an fp8 matrix, exact in f32 and rounded once if ``dtype`` is narrower.

    ``name`` is for the message if the scales do not fit or are not finite. A block has 256 possible weights: its row of
    blocks is looked up in a table of them.
    """
    if q.ndim != 2 or scale.shape != grid(q.shape, block):
        expected = grid(q.shape, block) if q.ndim == 2 else "a matrix"
        raise UserError(f"{name}: scales have shape {scale.shape}, expected {expected} for weights {q.shape}")
    scale = scale.astype(np.float32)
    if not np.isfinite(scale).all():
        raise UserError(f"{name}: the block scales hold NaN or infinity; the file is damaged")
    weights, codes = np.empty(q.shape, dtype), q.view(np.uint8)
    table_of_column = np.arange(q.shape[1]) // block[1] * 256
    for i, row in enumerate(scale):
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is found with the other non-finite weights
            table = np.multiply.outer(row, _VALUES).astype(dtype).reshape(-1)
        for start in range(i * block[0], min((i + 1) * block[0], len(q)), STRIP_ROWS):
            at = slice(start, min(start + STRIP_ROWS, (i + 1) * block[0]))
            np.take(table, codes[at] + table_of_column, out=weights[at], mode="clip")  # no index is out of range
    return weights


def quantise(w: np.ndarray, block: tuple[int, int] = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """``(q, scale)`` of a matrix, as Kimi-K2 was released: in every block scale = max|W| / 448 and q = W / scale.

    Both divisions are in f32; q is rounded to the nearest e4m3, ties to even. A block of zeros has scale 1. A block
    that holds NaN or infinity has a scale that is not finite. Beside the result, one row of blocks is held in f32.
    """
    q, scale = np.empty(w.shape, np.uint8), np.empty(grid(w.shape, block), np.float32)
    starts = np.arange(0, w.shape[1], block[1])
    least = np.finfo(np.float32).tiny  # a smaller scale would have lost bits of its own
    for i in range(len(scale)):
        at = slice(i * block[0], (i + 1) * block[0])
        rows = w[at].astype(np.float32)
        largest = np.maximum.reduceat(np.abs(rows).max(axis=0), starts)
        scale[i] = np.where(largest == 0, 1, np.maximum(largest / np.float32(LARGEST), least))
        with np.errstate(invalid="ignore"):
            rows /= np.repeat(scale[i], block[1])[: w.shape[1]]
        q[at] = _nearest(rows)
    return q.view(E4M3), scale


def _nearest(x: np.ndarray) -> np.ndarray:
    """The e4m3 bytes nearest to f32 numbers, ties to even.

    The upper half of the bits finds the byte; a lower half that is not zero sets the last bit of the upper, which is
    below e4m3's half unit and so only tells a tie from what is above it.
    """
    bits = x.view(np.uint32)
    upper = (bits >> 16).astype(np.uint16)
    upper |= bits.astype(np.uint16) != 0
    return _CODES[upper]
