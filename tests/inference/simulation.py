"""A device that has no model: the next token is a hash of what the pages say the text is, and of how it is sampled.

It executes plans by their arrays alone, so whatever goes wrong with pages, positions or parameters changes the tokens.
``alone`` gives the tokens of one request without pages, batches or steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from kimi_jax.inference.limits import Limits
from kimi_jax.inference.plan import StepPlan, StepResult
from kimi_jax.inference.request import Request
from kimi_jax.inference.sequence import row_seed


def draw(text: Sequence[int], sampling: tuple, allowed: Sequence[int]) -> int:
    return allowed[zlib.crc32(repr((list(map(int, text)), sampling)).encode()) % len(allowed)]


def logprob(text: Sequence[int], token: int) -> float:
    return -float(zlib.crc32(repr((list(map(int, text)), int(token))).encode()) % 1000) / 64


def alone(request: Request, sample: int, vocab: int, most: int) -> list[int]:
    """Tokens of one continuation, for at most ``most`` tokens in all."""
    s = request.sampling
    assert s.seed is not None
    seed = row_seed(s.seed, sample)
    text, grammar = list(request.prompt), request.grammar() if request.grammar else None
    last = most if request.max_tokens is None else len(text) + request.max_tokens
    while len(text) < last:
        new = text[len(request.prompt) :]
        known = {t: new.count(t) for t in ([*request.prompt, *new] if s.repetition_penalty != 1 else new)}
        penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        sampling = (
            seed, s.temperature, s.top_k, s.top_p, s.min_p, *penalties,
            sorted(known.items()) if any(p != q for p, q in zip(penalties, (1, 0, 0), strict=True)) else [],
            sorted(s.logit_bias.items()),
        )  # fmt: skip
        allowed = range(vocab)
        if grammar is not None:
            mask = grammar.mask()
            allowed = [t for t in range(vocab) if mask[t // 32] >> (t % 32) & 1]
            if not allowed:
                break
        text.append(draw(text, sampling, allowed))
        if text[-1] in request.stop_ids:
            break
        if grammar is not None:
            grammar.accept(text[-1])
    return text[len(request.prompt) :]


class Device:
    """Runs steps in order; the results of the last one may be asked for later, as those of a real device."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.cache_SPG = np.full((limits.shards, limits.n_pages, limits.page_size), -1)
        self.last: StepResult | None = None
        self.accepted = 0

    def run(self, plan: StepPlan) -> StepResult:
        limits, (B, T), J = self.limits, plan.tokens_BT.shape, plan.n_sampled
        assert B in limits.rows and B <= limits.max_rows and B * T <= limits.step_tokens
        assert plan.pages_BP.shape[1] in limits.page_tables
        shard_B = self._shards(plan, B)
        texts = []
        written = set()
        for b in range(B):
            start, length = plan.start_B[b], plan.length_B[b]
            if length == 0:
                assert not plan.pages_BP[b].any() and not plan.tokens_BT[b].any() and plan.feed_B[b] == -1
                texts.append(None)
                continue
            tokens = plan.tokens_BT[b, :length].copy()
            if plan.feed_B[b] >= 0:
                assert length == 1 and self.last is not None
                tokens[0] = self.last.tokens_BJ[plan.feed_B[b], 0]
            pages = plan.pages_BP[b]
            for position, token in enumerate(tokens, start):
                slot = shard_B[b], pages[position // limits.page_size], position % limits.page_size
                assert slot[1] > 0 and slot not in written, "a page that another row writes, or nobody's"
                written.add(slot)
                self.cache_SPG[slot] = token
            texts.append((self.cache_SPG[shard_B[b]], pages, start, length))
        assert any(texts)
        self.last = self._sample(plan, texts, B, T, J)
        return self.last

    def _shards(self, plan: StepPlan, B: int) -> list[int]:
        """Of every row; each of them with tokens, and no other, lives in one."""
        limits = self.limits
        if plan.rows_Sb is None:
            assert limits.shards == 1
            return [0] * B
        assert limits.shards == len(plan.rows_Sb) > 1 and plan.rows_Sb.dtype == np.int32
        found = [[row for row in rows if row != B] for rows in plan.rows_Sb.tolist()]
        assert all(rows == found[s] + [B] * (len(rows) - len(found[s])) for s, rows in enumerate(plan.rows_Sb.tolist()))
        most = max(map(len, found))
        assert most <= -(-limits.max_rows // limits.shards) and plan.rows_Sb.shape[1] < 2 * most
        assert sorted(sum(found, [])) == np.flatnonzero(plan.length_B).tolist()
        return [next((s for s, rows in enumerate(found) if b in rows), -1) for b in range(B)]

    def _sample(self, plan: StepPlan, texts: list, B: int, T: int, J: int) -> StepResult:
        tokens_BJ, count_B = np.full((B, J), -7), np.ones(B, np.int32)
        logprob_BJ, next_BT = np.zeros((B, J)), np.zeros((B, T))
        for b, row in enumerate(texts):
            if row is None:
                continue
            cache_PG, pages, start, length = row
            text = cache_PG[pages].reshape(-1)[: start + length].tolist()
            assert min(text) >= 0, "reads what was never written"
            drafted = plan.drafted_B[b]
            agreed = True
            for j in range(drafted + 1):
                prefix = text[: start + length - drafted + j]
                drafts = prefix[len(prefix) - j :] if j else []
                tokens_BJ[b, j] = draw(prefix, self._sampling(plan, b, drafts), self._allowed(plan, b, j))
                logprob_BJ[b, j] = logprob(prefix, tokens_BJ[b, j])
                agreed = agreed and j < drafted and tokens_BJ[b, j] == text[len(prefix)]
                count_B[b] += agreed
            self.accepted += count_B[b] - 1
            if plan.next_BT is not None:
                next_BT[b, :length] = [logprob(text[: start + t + 1], plan.next_BT[b, t]) for t in range(length)]
        tops = [np.zeros((*a.shape, plan.n_logprobs)) for a in (tokens_BJ, next_BT)]
        return StepResult(tokens_BJ, count_B, logprob_BJ, tops[0], tops[0], next_BT, tops[1], tops[1])

    def _sampling(self, plan: StepPlan, b: int, drafts: list[int]) -> tuple:
        vocab = self.limits.vocab_size

        def listed(keys, values) -> dict:
            return {} if keys is None else {int(k): v for k, v in zip(keys[b], values[b], strict=True) if k < vocab}

        seen = listed(plan.seen_BU, plan.times_BU)
        penalised = plan.repetition_B[b] != 1 or plan.presence_B[b] or plan.frequency_B[b]
        for token in drafts if penalised and plan.seen_BU is not None else []:
            seen[token] = seen.get(token, 0) + 1
        real = (plan.repetition_B, plan.presence_B, plan.frequency_B)
        return (
            int(plan.seed_B[b]), float(plan.temperature_B[b]), int(plan.top_k_B[b]), float(plan.top_p_B[b]),
            float(plan.min_p_B[b]), *(float(a[b]) for a in real), sorted((k, int(v)) for k, v in seen.items()),
            sorted((k, float(v)) for k, v in listed(plan.biased_BU, plan.bias_BU).items()),
        )  # fmt: skip

    def _allowed(self, plan: StepPlan, b: int, j: int) -> list[int]:
        vocab = range(self.limits.vocab_size)
        if plan.grammar_BJw is None:
            return list(vocab)
        return [t for t in vocab if plan.grammar_BJw[b, j, t // 32] >> (t % 32) & 1]
