"""What one step on the device computes, as flat arrays of few shapes; and what comes back.

Rows are left-aligned and padded to a size of ``Limits``; a row of length 0 is padding. Every row samples: before each
of the ``drafted`` tokens that end it, and after its last; what is sampled inside of a prompt means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from kimi_jax.inference.limits import Limits, padded
from kimi_jax.inference.request import GREEDY_BELOW, MAX_LOGPROBS, Logprob
from kimi_jax.inference.sequence import Sequence


class Row(NamedTuple):
    """One sequence's part in a step: the tokens that follow the ``start`` that are in the cache."""

    sequence: Sequence
    start: int
    tokens: list[int]
    drafted: int = 0  # of the tokens, those at the end that are guesses
    feed: int = -1  # if not negative: the token is the first that this row of the step before samples
    samples: bool = True
    scores: bool = False


class StepPlan(NamedTuple):
    """B rows of T tokens; the position of a sampled token is ``start + length - drafted`` and on.

    The sampling parameters are those of ``sampling.Sampling``, the lists those of ``sampling.Extras``: None if no row
    needs any. Arrays of int32 unless said otherwise.
    """

    tokens_BT: np.ndarray
    start_B: np.ndarray
    length_B: np.ndarray
    pages_BP: np.ndarray  # in the row's shard; padded with 0
    rows_Sb: np.ndarray | None  # the rows that live in each shard, padded with B; None if there is one shard
    feed_B: np.ndarray  # row of the step before whose first token is this row's only one, or -1
    drafted_B: np.ndarray
    seed_B: np.ndarray  # uint32
    temperature_B: np.ndarray  # f32
    top_k_B: np.ndarray
    top_p_B: np.ndarray  # f32
    min_p_B: np.ndarray  # f32
    repetition_B: np.ndarray  # f32
    presence_B: np.ndarray  # f32
    frequency_B: np.ndarray  # f32
    seen_BU: np.ndarray | None
    times_BU: np.ndarray | None
    biased_BU: np.ndarray | None
    bias_BU: np.ndarray | None  # f32
    grammar_BJw: np.ndarray | None  # uint32
    next_BT: np.ndarray | None  # the prompt's token after each one, where its log probability is asked for; else 0
    n_sampled: int  # J: how many tokens a row samples at most
    n_logprobs: int  # how many of the most likely tokens are reported


class StepResult(NamedTuple):
    """What ``sampling.sample`` returns, and the log probabilities of ``next_BT`` if there was one."""

    tokens_BJ: np.ndarray
    count_B: np.ndarray
    logprob_BJ: np.ndarray
    top_tokens_BJn: np.ndarray
    top_logprobs_BJn: np.ndarray
    next_logprob_BT: np.ndarray | None = None
    next_top_tokens_BTn: np.ndarray | None = None
    next_top_logprobs_BTn: np.ndarray | None = None

    def logprobs(self, i: int, n: int) -> list[Logprob]:
        """Of the tokens that row ``i`` sampled, with the ``n`` most likely."""
        return _read(self.logprob_BJ[i], self.top_tokens_BJn[i], self.top_logprobs_BJn[i], n)

    def next_logprobs(self, i: int, n: int) -> list[Logprob]:
        """Of the tokens that stand in the prompt after each token of row ``i``."""
        assert self.next_logprob_BT is not None
        assert self.next_top_tokens_BTn is not None and self.next_top_logprobs_BTn is not None
        return _read(self.next_logprob_BT[i], self.next_top_tokens_BTn[i], self.next_top_logprobs_BTn[i], n)


def _read(own_T: np.ndarray, tokens_Tn: np.ndarray, logprobs_Tn: np.ndarray, n: int) -> list[Logprob]:
    rows = zip(own_T.tolist(), tokens_Tn[:, :n].tolist(), logprobs_Tn[:, :n].tolist(), strict=True)
    return [Logprob(own, tuple(zip(tokens, found, strict=True))) for own, tokens, found in rows]


Extra = np.ndarray | None
_NEUTRAL = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def pack(rows: Many[Row], limits: Limits, T: int, J: int) -> StepPlan:
    """The arrays of a step of ``rows`` of up to ``T`` tokens, of which ``J`` are sampled: all (decode), or one."""
    B = padded(len(rows), limits.rows if T == J else limits.chunk_rows(T))
    tokens_BT = np.zeros((B, T), np.int32)
    n_pages = [limits.pages_for(row.start + len(row.tokens)) for row in rows]
    pages_BP = np.zeros((B, padded(max(n_pages), limits.page_tables)), np.int32)
    whole = np.zeros((B, 5), np.int32)
    whole[:, 3] = -1
    seed_B, real = np.zeros(B, np.uint32), np.full((B, 6), _NEUTRAL, np.float32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row.tokens)] = row.tokens
        pages_BP[i, : n_pages[i]] = row.sequence.pages[: n_pages[i]]
        sampling = row.sequence.request.sampling
        whole[i] = row.start, len(row.tokens), row.drafted, row.feed, sampling.top_k if row.samples else 0
        if row.samples:
            seed_B[i] = row.sequence.seed
            real[i] = (
                sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0, sampling.top_p, sampling.min_p,
                sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
            )  # fmt: skip
    start_B, length_B, drafted_B, feed_B, top_k_B = np.ascontiguousarray(whole.T)
    temperature_B, top_p_B, min_p_B, repetition_B, presence_B, frequency_B = np.ascontiguousarray(real.T)
    asked = [max(s.logprobs or 0, s.prompt_logprobs or 0) for s in (row.sequence.request.sampling for row in rows)]
    return StepPlan(
        tokens_BT, start_B, length_B, pages_BP, _by_shard(rows, B, limits), feed_B, drafted_B, seed_B, temperature_B,
        top_k_B, top_p_B, min_p_B, repetition_B, presence_B, frequency_B, *_extras(rows, B, J, limits),
        _next(rows, B, T), J, min(MAX_LOGPROBS, limits.vocab_size) if any(asked) else 0,
    )  # fmt: skip


def _by_shard(rows: Many[Row], B: int, limits: Limits) -> np.ndarray | None:
    if limits.shards == 1:
        return None
    found: list[list[int]] = [[] for _ in range(limits.shards)]
    for i, row in enumerate(rows):
        found[row.sequence.shard].append(i)
    rows_Sb = np.full((limits.shards, padded(max(map(len, found)), limits.shard_rows)), B, np.int32)
    for own_b, indices in zip(rows_Sb, found, strict=True):
        own_b[: len(indices)] = indices
    return rows_Sb


def _extras(rows: Many[Row], B: int, J: int, limits: Limits) -> tuple[Extra, Extra, Extra, Extra, Extra]:
    """Tokens seen and how often, tokens with a bias and theirs, masks: all if any row needs one, programs are few.

    A penalised row needs its list even if that is empty: the device adds the drafts to it.
    """
    sampling = {i: row.sequence for i, row in enumerate(rows) if row.samples}
    maps = {i: (sequence.seen, sequence.request.sampling.logit_bias) for i, sequence in sampling.items()}
    masks = {i: sequence.mask for i, sequence in sampling.items() if sequence.mask is not None}
    asked = [sequence.request.sampling for sequence in sampling.values()]
    if not masks and not any(own.penalised or own.logit_bias for own in asked):
        return None, None, None, None, None
    U = padded(max(len(found) for pair in maps.values() for found in pair), limits.lists)
    keys_2BU, values_2BU = np.full((2, B, U), limits.vocab_size, np.int32), np.zeros((2, B, U), np.float32)
    for i, pair in maps.items():
        for k, found in enumerate(pair):
            keys_2BU[k, i, : len(found)] = list(found.keys())
            values_2BU[k, i, : len(found)] = list(found.values())
    grammar_BJw = np.full((B, J, -(-limits.vocab_size // 32)), -1, np.int32).view(np.uint32)
    for i, mask in masks.items():
        grammar_BJw[i] = mask
    return keys_2BU[0], values_2BU[0].astype(np.int32), keys_2BU[1], values_2BU[1], grammar_BJw


def _next(rows: Many[Row], B: int, T: int) -> np.ndarray | None:
    if not any(row.scores for row in rows):
        return None
    next_BT = np.zeros((B, T), np.int32)
    for i, row in enumerate(rows):
        if row.scores:
            after = row.sequence.request.prompt[row.start + 1 : row.start + 1 + len(row.tokens)]
            next_BT[i, : len(after)] = after
    return next_BT
