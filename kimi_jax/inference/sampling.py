"""From logits to tokens, on the device, every row by its own parameters and no row by another's.

    z' = penalised(z + bias), -inf where the grammar forbids
    p  = softmax(z' / temperature), then of it the top k, then the most likely up to mass top_p, then those of at
         least min_p times the largest probability
    token = argmax_v log p_v + g_v,   g Gumbel noise from (seed, position)             (temperature 0: argmax z')

The noise of a position depends on the request's seed and on the position alone, so a row draws the same token in any
batch, and whether or not its tokens are drafted. That makes speculation exact: the drafted tokens are fed as if they
were right, every position draws its token, and a draft is accepted if it is the token drawn. A draft d is thus accepted
with probability p(d), and what replaces it follows p without d, renormalised: speculative sampling (arXiv 2211.17192)
for a draft that is certain of itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array

FORBIDDEN = -jnp.inf


class Sampling(NamedTuple):
    """The parameters of every row; the neutral value of each turns it off."""

    seed_B: Array  # uint32
    temperature_B: Array  # f32; 0: the most likely token
    top_k_B: Array  # int32; 0: all
    top_p_B: Array  # f32; 1: all
    min_p_B: Array  # f32; 0: all
    repetition_B: Array  # f32, 1: none. Divides positive and multiplies negative logits of tokens that occurred
    presence_B: Array  # f32, 0: none. Subtracted from the logits of tokens that were generated
    frequency_B: Array  # f32, 0: none. The same, times how often


class Extras(NamedTuple):
    """What few requests ask for; an entry that no row of the batch needs is None and costs nothing.

    ``seen_BU`` lists the different tokens of a row's prompt and answer, ``times_BU`` how often each is in the answer
    (0: in the prompt alone); ``bias_BU`` is added to the logits of ``biased_BU``. Lists are padded with any id past
    the vocabulary. ``grammar_BJw`` has 32 tokens a word, the lowest bit first: 1 allows; one mask for every position
    that is sampled.
    """

    seen_BU: Array | None = None  # int32
    times_BU: Array | None = None  # int32
    biased_BU: Array | None = None  # int32
    bias_BU: Array | None = None  # f32
    grammar_BJw: Array | None = None  # int32 or uint32, [B, J, ceil(V / 32)]


NO_EXTRAS = Extras()


class Sampled(NamedTuple):
    tokens_BJ: Array  # int32
    count_B: Array  # int32: how many of them stand: the accepted drafts and the token after them
    logprob_BJ: Array  # f32: log softmax of the model's own logits, whatever the parameters
    top_tokens_BJn: Array  # int32: the n most likely, likewise
    top_logprobs_BJn: Array  # f32


def sample(
    logits_BJV: Array,
    position_B: Array,
    drafts_BJ: Array,
    drafted_B: Array,
    sampling: Sampling,
    extras: Extras = NO_EXTRAS,
    n_logprobs: int = 0,
) -> Sampled:
    """Tokens for positions ``position + j``, j < J, after the drafts j < ``drafted`` of the row (J - 1 at most)."""
    B, J, V = logits_BJV.shape
    per_row = Sampling(*(jnp.repeat(a, J) for a in sampling))
    position_M = (position_B[:, None] + jnp.arange(J)).reshape(-1)
    adjusted_BJV = _adjusted(logits_BJV, drafts_BJ, sampling, extras)
    tokens_BJ = _draw(adjusted_BJV.reshape(-1, V), per_row, position_M).reshape(B, J)

    right_BJ = (tokens_BJ == drafts_BJ) & (jnp.arange(J) < drafted_B[:, None])
    count_B = 1 + jnp.sum(jnp.cumprod(right_BJ.astype(jnp.int32), axis=1), axis=1)
    total_BJ1 = jax.nn.logsumexp(logits_BJV, axis=-1, keepdims=True)
    logprob_BJ1 = jnp.take_along_axis(logits_BJV, tokens_BJ[..., None], axis=-1) - total_BJ1
    top_BJn, top_tokens_BJn = lax.top_k(logits_BJV, n_logprobs)
    return Sampled(tokens_BJ, count_B, logprob_BJ1[..., 0], top_tokens_BJn, top_BJn - total_BJ1)


def _adjusted(logits_BJV: Array, drafts_BJ: Array, sampling: Sampling, extras: Extras) -> Array:
    """Bias, penalties and grammar."""
    B, J, V = logits_BJV.shape
    row_B1 = jnp.arange(B)[:, None]
    if extras.biased_BU is not None:
        bias_BV = jnp.zeros((B, V)).at[row_B1, extras.biased_BU].add(extras.bias_BU, mode="drop")
        logits_BJV = logits_BJV + bias_BV[:, None]
    if extras.seen_BU is not None:
        seen_BV = jnp.zeros((B, V), bool).at[row_B1, extras.seen_BU].set(True, mode="drop")
        times_BV = jnp.zeros((B, V), jnp.int32).at[row_B1, extras.seen_BU].add(extras.times_BU, mode="drop")
        before_JJ = jnp.arange(J) < jnp.arange(J)[:, None]  # position j comes after the drafts before j
        drafts_BJJ = jnp.where(before_JJ, drafts_BJ[:, None], V)
        at = jnp.arange(B)[:, None, None], jnp.arange(J)[:, None], drafts_BJJ
        times_BJV = jnp.broadcast_to(times_BV[:, None], logits_BJV.shape).at[at].add(1, mode="drop")
        seen_BJV = seen_BV[:, None] | (times_BJV > 0)
        repetition_B11, presence_B11, frequency_B11 = (
            a[:, None, None] for a in (sampling.repetition_B, sampling.presence_B, sampling.frequency_B)
        )
        scaled_BJV = jnp.where(logits_BJV > 0, logits_BJV / repetition_B11, logits_BJV * repetition_B11)
        logits_BJV = jnp.where(seen_BJV, scaled_BJV, logits_BJV)
        logits_BJV = logits_BJV - presence_B11 * (times_BJV > 0) - frequency_B11 * times_BJV
    if extras.grammar_BJw is not None:
        bits_BJw32 = extras.grammar_BJw[..., None] >> jnp.arange(32, dtype=extras.grammar_BJw.dtype) & 1
        allowed_BJV = bits_BJw32.reshape(B, J, -1)[..., :V] > 0
        logits_BJV = jnp.where(allowed_BJV, logits_BJV, FORBIDDEN)
    return logits_BJV


def _draw(logits_MV: Array, sampling: Sampling, position_M: Array) -> Array:
    """One token per row: the most likely, or a draw from what temperature, top-k, top-p and min-p leave."""
    greedy_M = sampling.temperature_B == 0

    def drawn() -> Array:
        z_MV = logits_MV / jnp.where(greedy_M, 1, sampling.temperature_B)[:, None]
        z_MV = _truncated(z_MV, sampling)

        def noise(seed: Array, position: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), z_MV.shape[1:])

        noisy_MV = z_MV + jax.vmap(noise)(sampling.seed_B, position_M)
        return jnp.argmax(jnp.where(greedy_M[:, None], logits_MV, noisy_MV), axis=-1).astype(jnp.int32)

    most_likely = lambda: jnp.argmax(logits_MV, axis=-1).astype(jnp.int32)  # noqa: E731
    return lax.cond(jnp.all(greedy_M), most_likely, drawn)


def _truncated(z_MV: Array, sampling: Sampling) -> Array:
    """-inf for what top-k, top-p of the rest, and min-p leave out. Equals at a threshold stay or go together."""
    k_M1, p_M1, min_p_M1 = (a[:, None] for a in (sampling.top_k_B, sampling.top_p_B, sampling.min_p_B))

    def top_k(z_MV: Array) -> Array:
        k_M = jnp.where(k_M1 > 0, k_M1, z_MV.shape[1])[:, 0].astype(jnp.float32)
        return _most_likely(z_MV, jnp.ones_like(z_MV), k_M)

    def top_p(z_MV: Array) -> Array:
        p_M = jnp.maximum(p_M1[:, 0], 1e-9)  # the most likely token always stays
        return jnp.where(p_M1 < 1, _most_likely(z_MV, jax.nn.softmax(z_MV, axis=-1), p_M), z_MV)

    z_MV = lax.cond(jnp.any(k_M1 > 0), top_k, lambda z: z, z_MV)
    z_MV = lax.cond(jnp.any(p_M1 < 1), top_p, lambda z: z, z_MV)
    floor_M1 = jnp.max(z_MV, axis=-1, keepdims=True) + jnp.log(min_p_M1)
    return jnp.where(z_MV >= floor_M1, z_MV, FORBIDDEN)


def _most_likely(z_MV: Array, mass_MV: Array, target_M: Array) -> Array:
    """Keeps z >= t for the largest t whose kept mass reaches the target, and all if none does.

    t is found bit by bit among the integers that order all f32: 32 sums over the vocabulary, no sort.
    """
    bits_MV = lax.bitcast_convert_type(z_MV, jnp.int32)
    order_MV = jnp.where(bits_MV >= 0, bits_MV, -(bits_MV & 0x7FFFFFFF))

    def bit(i: Array, t_M: Array) -> Array:
        higher_M = t_M + lax.shift_left(jnp.int32(1), 31 - i)  # the first adds 2^31: from the least integer to 0
        mass_M = jnp.sum(mass_MV, axis=-1, where=order_MV >= higher_M[:, None])
        return jnp.where(mass_M >= target_M, higher_M, t_M)

    t_M = lax.fori_loop(0, 32, bit, jnp.full(z_MV.shape[:1], jnp.iinfo(jnp.int32).min))
    return jnp.where(order_MV >= t_M[:, None], z_MV, FORBIDDEN)
