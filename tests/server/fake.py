"""An engine without a model: it plays scripts, or samples at random under the constraint and the seed."""

from __future__ import annotations

import asyncio
import random

import numpy as np

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.engine import Finished, Job, Load, PromptScores, Token
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
        self.seen: list[Job] = []
        self.running = self.cancelled = self.finished = 0

    def load(self):
        return Load(running=self.running, waiting=0, pages_used=3 * self.running, pages_total=300, preemptions=0)

    async def generate(self, job):
        """One answer after the other."""
        self.seen.append(job)
        self.running += job.n
        left = job.n
        try:
            if job.sampling.prompt_logprobs is not None:
                scores = [self._token(i, job.sampling.prompt_logprobs) for i in job.prompt_ids]
                yield 0, PromptScores((Token(job.prompt_ids[0]), *scores[1:]))
            for sample in range(job.n):
                async for event in self._answer(sample, job):
                    left -= isinstance(event, Finished)
                    yield sample, event
        finally:
            self.running -= job.n
            self.cancelled += left
            self.finished += job.n - left

    async def _answer(self, sample, job):
        for count, token in enumerate(self._ids(sample, job)):
            if count == job.max_tokens:
                break
            await asyncio.sleep(self.delay)
            yield self._token(token, job.sampling.logprobs)
            if token in job.stop_ids:
                yield Finished("stop", cached_tokens=2)
                return
        else:
            if job.max_tokens:
                yield Finished("stop", cached_tokens=2)
                return
        yield Finished("length")

    def _token(self, token, top):
        if top is None:
            return Token(token)
        best = ((token, -1 - token / 1000), *((i, -2 - i / 1000) for i in range(97, 97 + max(top - 1, 0))))
        return Token(token, -1 - token / 1000, best[:top])

    def _ids(self, sample, job):
        scripted = self.script and self.script(list(job.prompt_ids))
        rng = random.Random(f"{job.sampling.seed}{sample}{list(job.prompt_ids)}")
        constraint = job.constraint() if self.lawful and job.constraint else None
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
