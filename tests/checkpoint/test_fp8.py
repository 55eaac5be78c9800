"""Block de-quantisation against the definition, element by element, in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kimi_jax.checkpoint import fp8
from kimi_jax.errors import UserError

E4M3 = ml_dtypes.float8_e4m3fn


def value(byte: int) -> float:
    """The number that an e4m3 byte stands for: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def random_fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Any byte but the two NaNs."""
    codes = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    return rng.choice(codes, shape).view(E4M3)


@pytest.mark.parametrize(
    "shape, block",
    [
        ((128, 128), (128, 128)),
        ((256, 128), (128, 128)),
        ((130, 300), (128, 128)),
        ((5, 3), (128, 128)),
        ((576, 64), (128, 128)),
        ((7, 10), (2, 3)),
        ((9, 4), (4, 4)),
        ((1, 257), (128, 128)),
    ],
)
def test_definition(shape, block):
    rng = np.random.default_rng(shape[0] * 1000 + shape[1])
    q = random_fp8(rng, shape)
    scale = (rng.uniform(0.5, 2, (-(-shape[0] // block[0]), -(-shape[1] // block[1]))) * 1e-3).astype(np.float32)
    found = fp8.dequantise(q, scale, "w", block)
    assert found.dtype == np.float32 and found.shape == shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            exact = value(int(q.view(np.uint8)[i, j])) * float(scale[i // block[0], j // block[1]])
            assert found[i, j] == np.float32(exact)


def test_input_is_not_written_to():
    q = random_fp8(np.random.default_rng(0), (6, 6))
    before = q.tobytes()
    q.flags.writeable = False
    fp8.dequantise(q, np.full((1, 1), 2, np.float32), "w")
    assert q.tobytes() == before


def test_grid_of_the_released_shapes():
    assert fp8.grid((576, 7168)) == (5, 56)
    assert fp8.grid((18432, 7168)) == (144, 56)


@pytest.mark.parametrize("grid", [(2, 3), (3, 1), (1,), (4, 2, 1), (1, 1)])
def test_wrong_grid(grid):
    with pytest.raises(UserError, match="layers.3.x"):
        fp8.dequantise(np.zeros((300, 150), E4M3), np.ones(grid, np.float32), "layers.3.x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scale_not_finite(bad):
    scale = np.ones((2, 2), np.float32)
    scale[1, 0] = bad
    with pytest.raises(UserError, match="layers.3.x.*scales"):
        fp8.dequantise(np.zeros((200, 200), E4M3), scale, "layers.3.x")


def test_vector():
    with pytest.raises(UserError, match="norm"):
        fp8.dequantise(np.zeros(5, E4M3), np.ones(1, np.float32), "norm")
