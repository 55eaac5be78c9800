"""Cached decoding against the full forward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.dims import map_specs
from kimi_jax.inference.decode import extend, generate, init_state, sample
from kimi_jax.model import KimiK2, specs

CFG = presets.tiny().replace(
    vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=10, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, dtype="float32", experts="looped",
)  # fmt: skip
VARIANTS = {
    "base": CFG,
    "no query latent, no shared experts": CFG.replace(q_lora_rank=None, n_shared_experts=0),
    "no dense layers": CFG.replace(first_k_dense_replace=0),
    "dense layers alone": CFG.replace(first_k_dense_replace=3),
}
PROMPTS = [np.random.default_rng(3).integers(0, 61, length).tolist() for length in (1, 33, 32, 60)]
EXTEND = jax.jit(extend, static_argnums=1)


def parameters(cfg):
    rng = np.random.default_rng(0)

    def draw(spec):
        if spec.std is None:
            return jnp.asarray(spec.fill + 0.2 * rng.standard_normal(spec.shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(spec.shape) / spec.shape[-2] ** 0.5, jnp.float32)

    return map_specs(draw, specs(cfg))


@partial(jax.jit, static_argnums=1)
def forward(params, cfg, tokens):
    return KimiK2(cfg).apply({"params": params}, tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_extending_a_cache_is_the_full_forward(name):
    """Rows of different lengths, in pieces of different sizes: up to 7 tokens a call, then one by one."""
    cfg = VARIANTS[name]
    params, tokens = parameters(cfg), np.random.default_rng(1).integers(0, 61, (3, 20))
    expected = np.asarray(forward(params, cfg, jnp.asarray(tokens)))
    state, length = init_state(cfg, 3, 24), np.zeros(3, int)
    for width, counts in [(7, [3, 7, 1]), (7, [5, 2, 7]), (7, [1, 6, 4]), *[(1, [1, 1, 1])] * 3]:
        piece = np.full((3, width), 60)  # what stands beyond a row's count must not matter
        for row, (start, count) in enumerate(zip(length, counts, strict=True)):
            piece[row, :count] = tokens[row, start : start + count]
        logits, state = EXTEND(params, cfg, state, jnp.asarray(piece), jnp.asarray(counts))
        length += counts
        np.testing.assert_array_equal(state.length_B, length)
        np.testing.assert_allclose(logits, expected[np.arange(3), length - 1], rtol=1e-4, atol=2e-5)


def test_a_row_may_wait():
    """A count of 0 leaves a sequence as it is."""
    params, tokens = parameters(CFG), np.random.default_rng(2).integers(0, 61, (3, 20))
    expected = np.asarray(forward(params, CFG, jnp.asarray(tokens)))
    state = init_state(CFG, 3, 24)
    for pieces in ([(0, 4), (0, 7), (0, 0)], [(4, 4), (7, 12), (0, 2)], [(4, 10), (12, 12), (2, 9)]):
        piece = np.full((3, 7), 60)
        for row, (start, stop) in enumerate(pieces):
            piece[row, : stop - start] = tokens[row, start:stop]
        logits, state = EXTEND(params, CFG, state, jnp.asarray(piece), jnp.asarray([b - a for a, b in pieces]))
    np.testing.assert_array_equal(state.length_B, [10, 12, 9])
    np.testing.assert_allclose(logits[0], expected[0, 9], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(logits[2], expected[2, 8], rtol=1e-4, atol=2e-5)


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    params, new = parameters(CFG), 9
    found = np.stack(list(generate(params, CFG, PROMPTS, new_tokens=new)), axis=1)
    assert found.shape == (4, new)

    tokens, rows = np.zeros((4, 72), np.int32), np.arange(4)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    length = np.asarray([len(prompt) for prompt in PROMPTS])
    for i in range(new):
        logits = np.asarray(forward(params, CFG, jnp.asarray(tokens)))[rows, length - 1]
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2] > 1e-4).all()  # no ties: the comparison means something
        np.testing.assert_array_equal(found[:, i], logits.argmax(axis=-1))
        tokens[rows, length] = found[:, i]
        length += 1


def test_sampled_generation_depends_on_the_seed_alone():
    def draw(seed: int) -> np.ndarray:
        return np.stack(list(generate(parameters(CFG), CFG, PROMPTS, new_tokens=9, temperature=1.5, seed=seed)))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_sample_follows_the_distribution():
    logits = jnp.asarray([0.0, 1.0, 2.0, -5.0])
    probs = np.exp(np.asarray(logits) / 0.7)
    probs /= probs.sum()
    drawn = np.asarray(sample(jnp.broadcast_to(logits, (20_000, 4)), 0.7, jax.random.key(0)))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, probs, atol=4 * 0.5 / 20_000**0.5)
    assert drawn.dtype == np.int32
    np.testing.assert_array_equal(sample(jnp.asarray([[1.0, 3.0], [2.0, 0.0]]), 0, jax.random.key(0)), [1, 0])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_bfloat16_runs_at_every_batch_size(batch):
    cfg = CFG.replace(dtype="bfloat16", experts="fastest")
    params, tokens = parameters(cfg), np.random.default_rng(4).integers(0, 61, (batch, 6))
    expected = np.asarray(forward(params, CFG, jnp.asarray(tokens)))[:, -1]
    state, ones = init_state(cfg, batch, 8), jnp.ones(batch, jnp.int32)
    _, state = EXTEND(params, cfg, state, jnp.asarray(tokens[:, :-1]), 5 * ones)
    logits, _ = EXTEND(params, cfg, state, jnp.asarray(tokens[:, -1:]), ones)
    assert np.linalg.norm(logits - expected) < 0.05 * np.linalg.norm(expected)
