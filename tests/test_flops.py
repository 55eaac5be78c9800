"""Counts against formulas written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from kimi_jax import flops, presets


def weights_of_kimi_k2(active: bool) -> int:
    """Matrices that a token meets (or all of them), layer by layer, from the released config.json."""
    D, N = 7168, 64
    attention = D * 1536 + 1536 * N * (128 + 64) + D * (512 + 64) + 512 * N * (128 + 128) + N * 128 * D
    expert = 3 * D * 2048
    moe = D * 384 + (8 if active else 384) * expert + expert
    return 61 * attention + 3 * D * 18_432 + 60 * moe + D * 163_840


def test_active_parameters():
    active = weights_of_kimi_k2(active=True)
    assert flops.active_parameters(presets.kimi_k2_1t()) == active
    assert active + 7168 * 163_840 == pytest.approx(32.9e9, rel=0.02)  # with the embedding: "32 B activated"


def test_active_parameters_without_a_query_latent():
    D, N = 2048, 16
    attention = D * N * 192 + D * 576 + 512 * N * 256 + N * 128 * D
    expert = 3 * D * 1408
    total = 27 * attention + 3 * D * 11_264 + 26 * (D * 64 + (6 + 2) * expert) + D * 163_840
    assert flops.active_parameters(presets.moonlight_16b()) == total


def test_flops_per_token():
    seq_len = 37
    pairs = sum(query + 1 for query in range(seq_len))
    attention = 61 * 64 * pairs * 2 * ((128 + 64) + 128)  # q.k and weights.v, a multiplication and an addition each
    forward = seq_len * 2 * weights_of_kimi_k2(active=True) + attention
    cfg = presets.kimi_k2_1t()
    assert flops.forward_flops_per_token(cfg, seq_len) * seq_len == pytest.approx(forward, rel=1e-12)
    assert flops.training_flops_per_token(cfg, seq_len) * seq_len == pytest.approx(3 * forward, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12)],
)
def test_peak_by_device_kind(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert flops.peak_flops() == 4 * peak


def test_peak_is_measured_elsewhere():
    assert 1e8 < flops.peak_flops() < 1e15
