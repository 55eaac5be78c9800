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


SHAPES = [
    ((256, 128), (128, 128)),
    ((130, 300), (128, 128)),
    ((1, 257), (128, 128)),
    ((5, 3), (128, 128)),
    ((7, 10), (2, 3)),
    ((9, 4), (4, 4)),
]
FINITE = [b for b in range(256) if b & 0x7F != 0x7F]
BY_VALUE = sorted((value(b), b & 1, b) for b in FINITE if b != 0x80)  # 0x80 is -0
VALUES = np.array([v for v, _, _ in BY_VALUE])
ODD, BYTE = (np.array([row[i] for row in BY_VALUE]) for i in (1, 2))


def nearest_bytes(x: np.ndarray) -> np.ndarray:
    """By search among all values, in float64; of two as near, the one whose last bit is 0. The sign of 0 is kept."""
    above = np.clip(np.searchsorted(VALUES, x), 1, len(VALUES) - 1)
    left, right = np.abs(x - VALUES[above - 1]), np.abs(x - VALUES[above])
    choose_left = (left < right) | ((left == right) & (ODD[above] == 1))
    byte = BYTE[np.where(choose_left, above - 1, above)]
    return np.where((byte == 0) & np.signbit(x), 0x80, byte).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape, block", SHAPES)
def test_quantise_is_the_released_rule(shape, block, dtype):
    rng = np.random.default_rng(shape[1])
    w = (rng.standard_normal(shape) * np.exp(rng.normal(0, 2, shape)) * 1e-2).astype(dtype)
    q, scale = fp8.quantise(w, block)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (E4M3, shape, np.float32, fp8.grid(shape, block))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            exact = w[at].astype(np.float64)
            assert scale[i, j] == np.float32(np.abs(exact).max() / 448)
            quotient = (exact / np.float64(scale[i, j])).astype(np.float32)  # one rounding: f32 division
            np.testing.assert_array_equal(q[at].view(np.uint8), nearest_bytes(quotient.astype(np.float64)))
            assert np.abs(q[at].astype(np.float32)).max() == 448


def test_every_rounding():
    """All bf16 numbers within range, each with four lower halves: ties, just above, just below; one block."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    x = (upper[:, None] | np.array([0, 1, 0x8000, 0xFFFF], np.uint32)).view(np.float32)
    x = np.append(x[np.abs(x) <= 448], np.float32(448))[None]
    q, scale = fp8.quantise(x, (1, x.size))
    assert scale.item() == 1
    np.testing.assert_array_equal(q.view(np.uint8), nearest_bytes(x.astype(np.float64)))


def test_quantising_again_changes_nothing():
    """Weights in the released form, with a 448 in every block, come back with the same bytes and scales."""
    rng = np.random.default_rng(3)
    q = random_fp8(rng, (300, 260)).view(np.uint8).copy()
    q[q == 0x80] = 0
    q[::128, ::128] = 0x7E
    q = q.view(E4M3)
    scale = (2.0 ** rng.uniform(-20, 2, (3, 3))).astype(np.float32)
    again, scale_again = fp8.quantise(fp8.dequantise(q, scale, "w"))
    np.testing.assert_array_equal(scale_again, scale)
    np.testing.assert_array_equal(again.view(np.uint8), q.view(np.uint8))


def test_round_trip_error():
    """A normal e4m3 is within 1/16 of the number; below the least normal, within half its step of 2^-9."""
    w = np.random.default_rng(4).standard_normal((384, 256)).astype(np.float32)
    q, scale = fp8.quantise(w)
    error = np.abs(fp8.dequantise(q, scale, "w").astype(np.float64) - w)
    step = np.repeat(np.repeat(scale, 128, 0), 128, 1).astype(np.float64) * 2.0**-10
    assert (error <= np.maximum(np.abs(w) / 16, step) * (1 + 1e-6)).all()
    assert 0.015 < np.sqrt((error**2).sum() / (w.astype(np.float64) ** 2).sum()) < 0.03


def test_blocks_of_zeros_and_of_the_smallest_numbers():
    w = np.zeros((256, 256), np.float32)
    w[0, 128:] = 2.0**-149
    w[128, 0] = -(2.0**-128)
    q, scale = fp8.quantise(w)
    assert scale[0, 0] == scale[1, 1] == 1 and np.isfinite(scale).all() and (scale > 0).all()
    found = fp8.dequantise(q, scale, "w")
    assert np.isfinite(found).all()
    assert np.abs(found - w).max() <= 2.0**-126 * 2.0**-10
    assert found[128, 0] == w[128, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_not_finite_shows_in_the_scale(bad):
    w = np.ones((130, 130), np.float32)
    w[129, 0] = bad
    finite = np.isfinite(fp8.quantise(w)[1])
    assert finite.tolist() == [[True, True], [False, True]]


def test_quantise_leaves_its_input():
    w = np.ones((4, 4), np.float32)
    w.flags.writeable = False
    fp8.quantise(w)
    assert (w == 1).all()


def test_every_byte():
    """All 256, the two NaNs among them, from a matrix that is not contiguous."""
    q = np.arange(256, dtype=np.uint8).reshape(16, 16).T.view(E4M3)
    found = fp8.dequantise(q, np.full((1, 1), 0.5, np.float32), "w")
    for byte in range(256):
        at = found[byte % 16, byte // 16]
        assert np.isnan(at) if byte & 0x7F == 0x7F else at == value(byte) / 2 and np.signbit(at) == byte >> 7
