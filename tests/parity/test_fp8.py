"""Rounding to fp8 against torch's own cast."""

from __future__ import annotations

import numpy as np
import torch

from kimi_jax.checkpoint import fp8


def test_rounding():
    """Random bits of every size within range; one block with scale 1."""
    bits = np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = np.append(x[np.abs(x) <= 448], np.float32(448))[None]
    q, scale = fp8.quantise(x, (1, x.size))
    assert scale.item() == 1
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(q.view(np.uint8), expected)


def test_blocks():
    """Scales and bytes of a matrix by torch arithmetic, as DeepSeek-V3's kernel computes them."""
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, scale = fp8.quantise(w.float().numpy())
    for i in range(3):
        for j in range(2):
            block = w[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
            s = block.abs().max() / 448.0
            assert scale[i, j] == s.item()
            expected = (block / s).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            np.testing.assert_array_equal(q[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].view(np.uint8), expected)
