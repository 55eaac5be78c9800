"""An engine without a model: it plays scripts, or samples at random under the constraint and the seed."""

from __future__ import annotations

import asyncio
import random

import numpy as np

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.engine import Finished, Load, PromptScores, Token
from tests.server.walks import allowed


class FakeEngine:
    """``script`` maps prompt ids to the ids of the answer; without one, tokens are random printable bytes.

    A constraint holds unless the engine is not ``lawful``. The log probability of each token is -1 - id / 1000, so that
    tests can tell them apart.
    """

    def __init__(self, tokenizer=None, script=None, max_model_len=4096, delay=0.0, haste=0.35, lawful=True):
        self.tokenizer = tokenizer or tk.load("bytes")
        self.vocab_size = self.tokenizer.vocab_size + 8
        self.max_model_len = max_model_len
        self.script, self.delay, self.haste, self.lawful = script, delay, haste, lawful
        self.seen: list = []  # (prompt ids, sampling)
        self.running = self.cancelled = self.finished = 0

    def load(self):
        return Load(running=self.running, waiting=0, pages_used=3 * self.running, pages_total=300)

    async def generate(self, prompt_ids, sampling, n=1):
        """One answer after the other."""
        self.seen.append((list(prompt_ids), sampling))
        self.running += n
        left = n
        try:
            if sampling.prompt_logprobs is not None:
                scores = [self._token(i, sampling.prompt_logprobs) for i in prompt_ids]
                yield 0, PromptScores((Token(prompt_ids[0]), *scores[1:]))
            for sample in range(n):
                async for event in self._answer(sample, prompt_ids, sampling):
                    left -= isinstance(event, Finished)
                    yield sample, event
        finally:
            self.running -= n
            self.cancelled += left
            self.finished += n - left

    async def _answer(self, sample, prompt_ids, sampling):
        for count, token in enumerate(self._ids(sample, prompt_ids, sampling)):
            if count == sampling.max_tokens:
                break
            await asyncio.sleep(self.delay)
            yield self._token(token, sampling.logprobs)
            if token in sampling.stop_ids:
                yield Finished("stop", cached_tokens=2)
                return
        else:
            if sampling.max_tokens:
                yield Finished("stop", cached_tokens=2)
                return
        yield Finished("length")

    def _token(self, token, top):
        if top is None:
            return Token(token)
        best = ((token, -1 - token / 1000), *((i, -2 - i / 1000) for i in range(97, 97 + max(top - 1, 0))))
        return Token(token, -1 - token / 1000, best[:top])

    def _ids(self, sample, prompt_ids, sampling):
        scripted = self.script and self.script(list(prompt_ids))
        rng = random.Random(f"{sampling.seed}{sample}{list(prompt_ids)}")
        constraint = sampling.constraint() if self.lawful and sampling.constraint else None
        closing = set(b'"]},') | set(range(256, self.vocab_size))
        while True:
            mask = constraint.mask() if constraint else None
            options = np.arange(32, 127) if mask is None else allowed(mask)
            if scripted:
                token = scripted.pop(0)
                assert mask is None or token in options, f"the script breaks the constraint at {token}"
            elif mask is None and rng.random() < 0.02:
                token = self.tokenizer.special_ids["<|im_end|>"]
            else:
                hasty = (
                    [i for i in options.tolist() if i in closing]
                    if rng.random() < self.haste and mask is not None
                    else []
                )
                token = rng.choice(hasty or options.tolist())
            yield token
            if constraint and token not in self.tokenizer.stop_ids:
                constraint.accept(token)


def script_of(tokenizer, text):
    """Ids of ``text`` with its markers as control tokens, then the end of the turn."""
    ids = tokenizer.encode(text, allow_special=True) + [tokenizer.special_ids["<|im_end|>"]]
    return lambda prompt_ids: list(ids)
