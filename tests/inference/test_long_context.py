"""A request that fills all 131,072 positions, against full attention in float64 at some of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.inference import cache, step
from kimi_jax.inference.engine import Engine
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Request, Sampling
from kimi_jax.layers.rope import frequencies
from tests.inference.tiny import parameters

LENGTH, NEW, PAGE, CHUNK = 131_072, 6, 64, 2048
CFG = presets.tiny().replace(
    vocab_size=61, hidden_size=12, intermediate_size=20, num_hidden_layers=1, first_k_dense_replace=1,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=3,
    dtype="float32", rope=presets.YARN_K2, max_position_embeddings=LENGTH,
)  # fmt: skip


def logprobs(params, tokens: list[int], at: range) -> np.ndarray:
    """log softmax of the model's one layer at some positions, over all positions before, [len(at), V] in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    layer = jax.tree.map(lambda a: a[0], p["dense_layers"])
    attn, mlp = layer["attn"], layer["mlp"]
    H, C = CFG.qk_nope_head_dim, CFG.kv_lora_rank
    scale = (H + CFG.qk_rope_head_dim) ** -0.5 * (0.1 * np.log(CFG.rope.factor) + 1) ** 2

    def norm(a, gain, eps):
        return gain * a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + eps)

    def rotate(a, positions):
        turned = a[..., 0::2] + 1j * a[..., 1::2]
        turned = turned * np.exp(1j * np.multiply.outer(positions, frequencies(CFG.rope, 4).astype(np.float64)))
        return np.stack([turned.real, turned.imag], axis=-1).reshape(a.shape)

    x_SD = p["embedding"][tokens[: at.stop]]
    h_SD = norm(x_SD, layer["attn_norm"], CFG.rms_norm_eps)
    x_TD, h_TD = x_SD[at.start :], h_SD[at.start :]
    kv_SX, cq_TQ = h_SD @ attn["kv_a"], norm(h_TD @ attn["q_a"], attn["q_norm"], 1e-6)
    c_SC, k_rope_SR = norm(kv_SX[:, :C], attn["kv_norm"], 1e-6), rotate(kv_SX[:, C:], np.arange(at.stop))
    later_TS = np.arange(at.stop) > np.asarray(at)[:, None]
    for n in range(CFG.num_attention_heads):
        q_TX = cq_TQ @ attn["q_b"][:, n]
        logits_TS = q_TX[:, :H] @ (c_SC @ attn["kv_b"][:, n, :H]).T + rotate(q_TX[:, H:], np.asarray(at)) @ k_rope_SR.T
        weights_TS = np.where(later_TS, 0, np.exp(scale * (logits_TS - logits_TS.max(axis=-1, keepdims=True))))
        o_TW = weights_TS @ (c_SC @ attn["kv_b"][:, n, H:]) / weights_TS.sum(axis=-1, keepdims=True)
        x_TD = x_TD + o_TW @ attn["o"][n]
    h_TD = norm(x_TD, layer["mlp_norm"], CFG.rms_norm_eps)
    gate_TF = h_TD @ mlp["gate"]
    x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ mlp["up"])) @ mlp["down"]
    z_TV = norm(x_TD, p["norm"], CFG.rms_norm_eps) @ p["lm_head"]
    z_TV = z_TV - z_TV.max(axis=-1, keepdims=True)
    return z_TV - np.log(np.exp(z_TV).sum(axis=-1, keepdims=True))


@pytest.mark.slow
def test_a_request_of_131072_positions(monkeypatch):
    """Read in chunks, decoded to the last position; nothing grows with the square of the length."""
    programs = {}

    def shape_of(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, jax.Array | np.ndarray) else a

    def record(name):
        program = getattr(step, name)

        def recorded(*arguments):
            shapes = jax.tree.map(shape_of, arguments)
            programs[name, str(shapes)] = program, shapes
            return program(*arguments)

        monkeypatch.setattr(step, name, recorded)

    for name in ("compute", "choose", "score"):
        record(name)
    params = parameters(CFG)
    n_pages = 1 + LENGTH // PAGE
    limits = Limits(n_pages, PAGE, LENGTH, CFG.vocab_size, max_rows=1, step_tokens=CHUNK)
    engine = Engine(params, CFG, limits)
    assert engine._runner._state.cache_LPGX.nbytes == cache.n_bytes(CFG, n_pages, PAGE) == n_pages * PAGE * 10 * 4

    prompt = np.random.default_rng(0).integers(0, CFG.vocab_size, LENGTH - NEW).tolist()
    sampling = Sampling(logprobs=0, prompt_logprobs=0)
    events = list(engine.generate([Request(tuple(prompt), sampling, max_tokens=NEW)]))
    assert events[-1].finish == "length", events[-1].message
    assert engine.load().pages_used == 0
    tokens = prompt + [token for event in events for token in event.tokens]
    found = [None, *(score.logprob for event in events for score in event.prompt_logprobs if score)]
    found += [score.logprob for event in events for score in event.logprobs]
    assert len(tokens) == len(found) == LENGTH

    for start in (0, CHUNK - 8, 40_000, 99_999, LENGTH - NEW - 12):
        at = range(start, min(start + 24, LENGTH - 1))
        expected_TV = logprobs(params, tokens, at)
        after = [tokens[t + 1] for t in at]
        np.testing.assert_allclose([found[t + 1] for t in at], expected_TV[np.arange(len(at)), after], atol=2e-4)
    assert (np.argmax(expected_TV[-NEW:], axis=-1) == tokens[-NEW:]).all()  # of the last window: what was decoded

    assert {arguments[7] for program, arguments in programs.values() if program.__name__ == "compute"} == {CHUNK, 1}
    assert {name for name, _ in programs} == {"compute", "choose", "score"}
    for program, arguments in programs.values():
        memory = program.lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < CHUNK * LENGTH  # a byte for every pair of a chunk would be more
