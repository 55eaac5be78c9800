"""Unpacking of int4 groups against an element-wise twin and against what compressed-tensors packs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kimi_jax.checkpoint import int4
from kimi_jax.errors import UserError


def pack(n: np.ndarray) -> np.ndarray:
    """int32 words of signed 4-bit numbers: the first of eight in the lowest bits, each plus 8, rows filled with 0."""
    words = np.zeros((n.shape[0], -(-n.shape[1] // 8)), np.int64)
    for i, row in enumerate(n):
        for j, number in enumerate(row):
            words[i, j // 8] |= (int(number) + 8) << 4 * (j % 8)
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape, group", [((3, 64), 32), ((64, 32), 32), ((2, 40), 32), ((5, 13), 4), ((1, 1), 32)])
def test_definition(shape, group, dtype):
    rng = np.random.default_rng(shape[1])
    n = rng.integers(-8, 8, shape)
    scale = rng.uniform(-2, 2, (shape[0], -(-shape[1] // group))).astype(dtype)
    found = int4.dequantise(pack(n), scale, shape[1], "w", group)
    assert found.dtype == np.float32 and found.shape == shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            assert found[i, j] == np.float32(int(n[i, j]) * float(scale[i, j // group]))


def test_words_that_compressed_tensors_packs():
    """``pack_to_int32([[-8, -7, -1, 0, 1, 2, 6, 7, 3, -4]], 4)`` of compressed-tensors 0.20 gives these two words."""
    words = np.array([[0xFEA98710, 0x0000004B]], np.uint32).view(np.int32)
    found = int4.dequantise(words, np.ones((1, 1), np.float32), 10, "w")
    assert found.tolist() == [[-8, -7, -1, 0, 1, 2, 6, 7, 3, -4]]


def test_input_need_not_be_contiguous_and_is_not_written_to():
    n = np.random.default_rng(0).integers(-8, 8, (6, 64))
    packed, scale = pack(n), np.full((6, 2), 0.5, np.float32)
    before = packed.tobytes()
    packed.flags.writeable = False
    np.testing.assert_array_equal(int4.dequantise(packed[::2], scale[::2], 64, "w"), n[::2] / 2)
    assert packed.tobytes() == before and (scale == 0.5).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scale_not_finite(bad):
    scale = np.ones((4, 2), np.float32)
    scale[3, 1] = bad
    with pytest.raises(UserError, match="layers.3.x.*scales"):
        int4.dequantise(np.zeros((4, 8), np.int32), scale, 64, "layers.3.x")
