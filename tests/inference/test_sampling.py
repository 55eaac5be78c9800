"""Sampling against float64: the parameters one by one and together, the draws by their frequencies."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.inference.sampling import Extras, Sampling, sample

SAMPLE = jax.jit(sample, static_argnames="n_logprobs")
NEUTRAL = {
    "seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "repetition": 1.0, "presence": 0.0, "frequency": 0.0,
}  # fmt: skip
DTYPES = {"seed": np.uint32, "top_k": np.int32}


def sampling(n, **given):
    values = {key: np.broadcast_to(given.get(key, value), n) for key, value in NEUTRAL.items()}
    return Sampling(**{f"{key}_B": jnp.asarray(v, DTYPES.get(key, np.float32)) for key, v in values.items()})


def draw(logits, n, position=0, extras=Extras(), **given):  # noqa: B008
    """n tokens from one row of logits, each with a seed of its own."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, 1, len(logits)))
    extras = Extras(*(a if a is None else jnp.broadcast_to(a, (n, *a.shape[1:])) for a in extras))
    none = jnp.zeros((n, 1), jnp.int32)
    drawn = SAMPLE(
        rows, jnp.full(n, position), none, none[:, 0], sampling(n, **{"seed": np.arange(n), **given}), extras
    )
    assert (drawn.count_B == 1).all()
    return np.asarray(drawn.tokens_BJ[:, 0])


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    z = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-z)
    p = np.zeros(len(z))
    if top_k:
        order = order[:top_k]
    p[order] = np.exp(z[order] - z.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def check(tokens, p):
    """Nothing that cannot be, and every frequency within five standard deviations."""
    assert (p[tokens] > 0).all()
    share = np.bincount(tokens, minlength=len(p)) / len(tokens)
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / len(tokens)) + 1e-9).all(), (share, p)


LOGITS = np.asarray([0.3, -1.0, 2.0, 1.4, 0.9, -3.0, 1.1, -0.2, 0.0, -7.0])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 4},
        {"top_k": 1},
        {"top_k": 99},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.8, "min_p": 0.25},
    ],
)
def test_frequencies_follow_the_distribution(given):
    check(draw(LOGITS, 20_000, **given), distribution(LOGITS, **given))


@pytest.mark.parametrize("top_k, top_p", [(40, 1.0), (0, 0.9), (0, 0.3), (300, 0.6)])
def test_what_is_left_of_a_wide_vocabulary(top_k, top_p):
    """Large and small logits of both signs: the tokens that can be drawn are those of float64."""
    logits = np.random.default_rng(0).standard_normal(1000) * 4 - 3
    tokens = draw(logits, 20_000, top_k=top_k, top_p=top_p)
    check(tokens, distribution(logits, top_k=top_k, top_p=top_p))


def test_rows_have_parameters_of_their_own_and_neighbours_change_nothing():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((6, 1, 50)), jnp.float32)
    given = {
        "seed": np.arange(6) + 40, "temperature": [0, 1, 0.3, 0, 2, 1], "top_k": [0, 5, 0, 9, 0, 0],
        "top_p": [1, 1, 0.5, 1, 0.9, 1], "min_p": [0, 0, 0, 0, 0.1, 0],
    }  # fmt: skip
    position, none = jnp.arange(6) * 7, jnp.zeros((6, 1), jnp.int32)
    together = SAMPLE(logits, position, none, none[:, 0], sampling(6, **given)).tokens_BJ[:, 0]
    for i in range(6):
        one = sampling(1, **{key: np.asarray(value)[i] for key, value in given.items()})
        alone = SAMPLE(logits[i : i + 1], position[i : i + 1], none[:1], none[0], one).tokens_BJ[0, 0]
        assert alone == together[i]
    np.testing.assert_array_equal(together[jnp.asarray([0, 3])], logits[jnp.asarray([0, 3]), 0].argmax(axis=-1))


def test_the_seed_and_the_position_choose_the_draw():
    flat = np.zeros(1000)
    first = draw(flat, 50, position=3)
    np.testing.assert_array_equal(first, draw(flat, 50, position=3))
    assert (first != draw(flat, 50, position=4)).mean() > 0.9
    assert len(set(first.tolist())) > 40


def test_bias_penalties_and_grammar_equal_float64():
    """Greedy over logits adjusted one request at a time."""
    rng, V, B, J = np.random.default_rng(2), 70, 8, 3
    logits = rng.standard_normal((B, J, V)).astype(np.float32) * 2
    seen = np.stack([rng.permutation(V)[:6] for _ in range(B)])
    times = rng.integers(0, 4, (B, 6))
    seen[:, 5] = V  # padding
    biased, bias = np.stack([rng.permutation(V)[:3] for _ in range(B)]), rng.standard_normal((B, 3)) * 3
    biased[0] = V + 5
    words = rng.integers(0, 2**32, (B, J, 3), dtype=np.uint32)
    drafts = rng.integers(0, V, (B, J))
    drafts[1] = seen[1, 0]
    given = {
        "repetition": rng.uniform(0.7, 2, B), "presence": rng.uniform(-1, 2, B), "frequency": rng.uniform(-1, 2, B)
    }  # fmt: skip
    expected = np.empty((B, J), int)
    for b, j in np.ndindex(B, J):
        z = logits[b, j].astype(np.float64)
        for token, value in zip(biased[b], bias[b], strict=True):
            if token < V:
                z[token] += value
        count = {int(t): int(n) for t, n in zip(seen[b, :5], times[b], strict=False)}
        for token in drafts[b, :j].tolist():
            count[token] = count.get(token, 0) + 1
        for token, n in count.items():
            z[token] *= given["repetition"][b] ** (-1 if z[token] > 0 else 1)
            z[token] -= given["presence"][b] * (n > 0) + given["frequency"][b] * n
        for token in range(V):
            if not words[b, j, token // 32] >> np.uint32(token % 32) & 1:
                z[token] = -np.inf
        expected[b, j] = z.argmax()
    for dtype in (np.uint32, np.int32):
        extras = Extras(*map(jnp.asarray, (seen, times, biased, bias.astype(np.float32), words.view(dtype))))
        got = SAMPLE(logits, jnp.zeros(B), drafts, jnp.zeros(B), sampling(B, temperature=0, **given), extras)
        np.testing.assert_array_equal(got.tokens_BJ, expected)


def test_logprobs_are_those_of_the_model():
    logits = np.random.default_rng(3).standard_normal((4, 2, 30)).astype(np.float32) * 3
    none = jnp.zeros((4, 2), jnp.int32)
    got = SAMPLE(logits, none[:, 0], none, none[:, 0], sampling(4, temperature=0.2, top_k=2), n_logprobs=5)
    z = logits.astype(np.float64)
    expected = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        got.logprob_BJ, np.take_along_axis(expected, np.asarray(got.tokens_BJ)[..., None], -1)[..., 0], atol=1e-5
    )
    order = np.argsort(-expected, axis=-1)[..., :5]
    np.testing.assert_array_equal(got.top_tokens_BJn, order)
    np.testing.assert_allclose(got.top_logprobs_BJn, np.take_along_axis(expected, order, -1), atol=1e-5)


def chain(token):
    """A model whose logits depend on the last token."""
    return np.random.default_rng(1000 + token).standard_normal(5) * 1.5


CHAIN = jnp.asarray(np.stack([chain(token) for token in range(5)]), jnp.float32)


def speculate(drafts, seeds, temperature):
    """Tokens after token 0 at position 1, with ``drafts`` [2] for every seed; -1 past what was accepted."""
    n = len(seeds)
    drafts = jnp.broadcast_to(jnp.asarray([*drafts, 0]), (n, 3))
    logits = CHAIN[jnp.concatenate([jnp.zeros((n, 1), jnp.int32), drafts[:, :2]], axis=1)]
    got = SAMPLE(logits, jnp.ones(n), drafts, jnp.full(n, 2), sampling(n, seed=seeds, temperature=temperature))
    return np.where(np.arange(3) < got.count_B[:, None], got.tokens_BJ, -1)


def plainly(seeds, temperature):
    """The same three tokens one by one."""
    n, out = len(seeds), [np.zeros(len(seeds), int)]
    none = jnp.zeros((n, 1), jnp.int32)
    for j in range(3):
        logits = CHAIN[jnp.asarray(out[-1])][:, None]
        got = SAMPLE(logits, jnp.full(n, 1 + j), none, none[:, 0], sampling(n, seed=seeds, temperature=temperature))
        out.append(np.asarray(got.tokens_BJ[:, 0]))
    return np.stack(out[1:], axis=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepted_drafts_are_what_plain_sampling_gives(temperature):
    """Token for token, so the distribution is the same; and drafts that are right are all accepted."""
    seeds = np.arange(2000)
    plain = plainly(seeds, temperature)
    for drafts in np.ndindex(5, 5):
        found = speculate(drafts, seeds, temperature)
        accepted = np.cumprod(plain[:, :2] == np.asarray(drafts), axis=1).sum(axis=1)
        np.testing.assert_array_equal((found >= 0).sum(axis=1), accepted + 1)
        np.testing.assert_array_equal(found[found >= 0], plain[found >= 0])


def test_a_draft_is_accepted_with_its_probability_and_replaced_by_the_rest():
    n, draft = 20_000, 2
    found = speculate([draft, 1], np.arange(n), 1.0)
    p = distribution(chain(0))
    check(found[:, 0], p)
    accepted = found[found[:, 0] == draft]
    check(accepted[:, 1], distribution(chain(draft)))
    check(found[found[:, 0] != draft][:, 0], np.where(np.arange(5) == draft, 0, p) / (1 - p[draft]))
    assert (found[found[:, 0] != draft][:, 1:] == -1).all()


def test_only_the_drafts_of_a_row_can_be_accepted():
    """Behind a row's own drafts stand other numbers, and the greedy token may equal them."""
    logits = jnp.zeros((3, 3, 5)).at[..., 4].set(1)
    drafts = jnp.full((3, 3), 4)
    got = SAMPLE(logits, jnp.zeros(3), drafts, jnp.asarray([0, 1, 2]), sampling(3, temperature=0))
    np.testing.assert_array_equal(got.count_B, [1, 2, 3])


def test_equals_at_a_threshold_stay_together():
    assert set(draw([1.0, 0.0, -0.0, -1.0], 2000, top_k=2).tolist()) == {0, 1, 2}


def test_zero_logprobs_cost_nothing():
    got = jax.eval_shape(partial(sample, n_logprobs=0), *shapes())
    assert got.top_tokens_BJn.shape == (2, 1, 0)


def shapes():
    row, one = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    return jax.ShapeDtypeStruct((2, 1, 9), jnp.float32), row, one, row, sampling(2)
