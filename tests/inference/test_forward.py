"""Steps over the paged cache against the full forward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.inference import attention, cache
from kimi_jax.inference.forward import after, forward
from kimi_jax.model import head, in_compute_dtype
from tests.inference.tiny import CFG, full, parameters

VARIANTS = {
    "no query latent, no shared experts": CFG.replace(q_lora_rank=None, n_shared_experts=0),
    "no dense layers": CFG.replace(first_k_dense_replace=0),
    "dense layers alone": CFG.replace(first_k_dense_replace=3),
}
TOKENS = np.random.default_rng(1).integers(0, 61, (3, 40))
PAGES = 1 + np.random.default_rng(2).permutation(3 * 40).reshape(3, 40)  # as many as pages of 1 token need


@partial(jax.jit, static_argnums=(1, 7), donate_argnums=2)
def step(params, cfg, pages, tokens, start, length, tables, J):
    x, pages = forward(params, cfg, pages, tokens, start, length, tables)
    return head(params, after(x, jnp.maximum(length - J, 0), J)), pages


def run(params, cfg, plan, page_size=4, tokens=TOKENS, tables=PAGES):
    """The logits after every token of all rows, fed as ``plan`` [(width, new tokens of each row)] says."""
    pages, start = cache.init(cfg, 121, page_size), np.zeros(len(tokens), int)
    found = np.full((*tokens.shape, cfg.vocab_size), np.nan, np.float32)
    for width, counts in plan:
        piece = np.full((len(tokens), width), 60)  # what stands beyond a row's count must not matter
        for row, (a, n) in enumerate(zip(start, counts, strict=True)):
            piece[row, :n] = tokens[row, a : a + n]
        got, pages = step(params, cfg, pages, piece, start, np.asarray(counts), tables, width)
        for row, (a, n) in enumerate(zip(start, counts, strict=True)):
            found[row, a : a + n] = got[row, :n]
        start = start + counts
    return found, start


def same(found, expected, length):
    for row, n in enumerate(length):
        worst = np.abs(found[row, :n] - expected[row, :n]).max(initial=0)
        assert worst <= 2e-5 * np.abs(expected).max(), (row, worst)


def run_and_expect(params, cfg, plan, reference=None, **how):
    found, length = run(params, cfg, plan, **how)
    return found, np.asarray(full(*(reference or (params, cfg)), jnp.asarray(TOKENS))), length


PLANS = {
    "chunks, waiting rows, single tokens": [(7, [3, 7, 0]), (7, [7, 2, 7]), (7, [0, 7, 6]), *[(1, [1, 1, 1])] * 3],
    "drafts of several tokens": [(7, [7, 7, 1]), *[(3, [3, 1, 2]), (3, [2, 3, 3])] * 2],
    "all at once": [(40, [40, 13, 0])],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_any_variant_of_the_model(name):
    cfg, plan = VARIANTS[name], PLANS["chunks, waiting rows, single tokens"]
    params = parameters(cfg)
    same(*run_and_expect(params, cfg, plan))


@pytest.mark.parametrize("plan, page_size", [*zip(PLANS, (4, 5, 1), strict=True)])
def test_any_chunking_and_page_size(plan, page_size):
    same(*run_and_expect(parameters(CFG), CFG, PLANS[plan], page_size=page_size))


def test_many_blocks_and_groups(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "LARGEST", 200)
    cfg = CFG.replace(max_position_embeddings=77)  # another program
    same(*run_and_expect(parameters(cfg), cfg, PLANS["all at once"]))


@pytest.mark.parametrize("name, exact", [("dense layers alone", True), ("no dense layers", False)])
def test_a_row_does_not_depend_on_its_neighbours(name, exact):
    """Other tokens, lengths and pages beside it: the same bits, but for the order of sums in an expert's product, which
    XLA:CPU chooses by the number of rows that go to the expert."""
    cfg, other = VARIANTS[name], np.random.default_rng(5).integers(0, 61, TOKENS.shape)
    other[0] = TOKENS[0]
    tables = PAGES.copy()
    tables[1:] = PAGES[[2, 1]]
    alone, _ = run(parameters(cfg), cfg, [(7, [7, 0, 0])] * 3)
    among, _ = run(parameters(cfg), cfg, [(7, [7, 5, 7])] * 3, tokens=other, tables=tables)
    if exact:
        np.testing.assert_array_equal(alone[0, :21], among[0, :21])
    same(among[:1, :21], alone[:1, :21], [21])


def test_rows_may_share_the_pages_of_a_prefix():
    """Row 0 prefills 8 tokens, two pages; rows 1 and 2 start after them and go on by themselves."""
    params, tokens = parameters(CFG), TOKENS.copy()
    tokens[1:, :8] = tokens[0, :8]
    tables = PAGES.copy()
    tables[1:, :2] = tables[0, :2]
    expected = np.asarray(full(params, CFG, jnp.asarray(tokens)))
    pages = cache.init(CFG, 121, 4)
    for start, n in ((0, 7), (7, 1)):
        counts = np.asarray([n, 0, 0])
        _, pages = step(params, CFG, pages, tokens[:, start : start + 7], np.full(3, start), counts, tables, 7)
    counts = np.asarray([5, 3, 7])
    got, _ = step(params, CFG, pages, tokens[:, 8:15], np.full(3, 8), counts, tables, 7)
    for row, n in enumerate(counts):
        assert np.abs(got[row, :n] - expected[row, 8 : 8 + n]).max() <= 2e-5 * np.abs(expected).max()


def test_bfloat16_stays_near_float32():
    cfg = CFG.replace(dtype="bfloat16", experts="fastest")
    plan, params = PLANS["chunks, waiting rows, single tokens"], parameters(CFG)
    found, expected, _ = run_and_expect(in_compute_dtype(cfg, params), cfg, plan, reference=(params, CFG))
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.nanmedian(error) < 0.05  # of most tokens: near ties send a few to other experts


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_bfloat16_runs_at_every_batch_size(rows):
    cfg, params = CFG.replace(dtype="bfloat16", experts="fastest"), parameters(CFG)
    tokens, tables = np.random.default_rng(4).integers(0, 61, (rows, 7)), 1 + np.arange(2 * rows).reshape(rows, 2)
    plan = [(6, [6] * rows), (1, [1] * rows)]
    found, _ = run(in_compute_dtype(cfg, params), cfg, plan, tokens=tokens, tables=tables)
    expected = np.asarray(full(params, CFG, jnp.asarray(tokens)))
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 0.05


def test_a_step_holds_the_cache_once():
    """Donated, written and read in place: what a step holds besides is less than one layer of the cache."""
    shapes = jax.eval_shape(lambda: parameters(CFG))
    pages = jax.ShapeDtypeStruct(cache.shape(CFG, 4000, 16), jnp.float32)
    row = jax.ShapeDtypeStruct((2,), jnp.int32)
    tokens, tables = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    memory = step.lower(shapes, CFG, pages, tokens, row, row, tables, 1).compile().memory_analysis()
    n_bytes = cache.n_bytes(CFG, 4000, 16)
    assert memory.alias_size_in_bytes >= n_bytes
    assert memory.temp_size_in_bytes < n_bytes / 3
