"""Against numpy's own test on the same numbers in f64."""

import numpy as np
import pytest

from kimi_jax.checkpoint.finite import EXPONENTS, STRIP_BYTES, is_finite


@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
def test_every_pattern(dtype):
    """Every value of one and two bytes; of wider ones, random bits and the neighbours of infinity."""
    rng = np.random.default_rng(0)
    n = dtype.itemsize
    bits = np.arange(1 << 8 * n, dtype=f"u{n}") if n <= 2 else rng.integers(0, 1 << 8 * n, 4000, dtype=f"u{n}")
    if n > 2:
        around = [np.inf, -np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).tiny, 0]
        bits = np.concatenate([bits, np.array(around, dtype).view(bits.dtype)])
    values = bits.view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(values.astype(np.float64))
    assert [is_finite(values[i : i + 1]) for i in range(values.size)] == expected.tolist()
    assert is_finite(values[expected]) and not is_finite(values)


def test_one_among_many():
    values = np.zeros(STRIP_BYTES, np.float32)  # four strips
    assert is_finite(values) and is_finite(values[:0])
    values[-1] = np.nan
    assert not is_finite(values) and not is_finite(values.reshape(2, -1).T)
