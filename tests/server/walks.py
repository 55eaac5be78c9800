"""Random walks under a constraint: what a model of random weights would write."""

import random

import numpy as np

from kimi_jax.data import tokenizer as tk


def allowed(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


class Walker:
    """Samples allowed tokens uniformly, and with ``haste`` one that closes a string, list or object if there is one."""

    def __init__(self, tokenizer: tk.Tokenizer, seed: int, haste: float = 0.4):
        self.tokenizer, self.rng, self.haste = tokenizer, random.Random(seed), haste
        self._closes = np.array(
            [piece[:1] == b"," or any(c in piece for c in b'"]}') for piece in tokenizer.pieces] + [True] * 1000
        )

    def walk(self, constraint, limit=800):
        """Ids up to a stop id, which is not one of them; None if ``limit`` comes first."""
        ids: list[int] = []
        while len(ids) < limit:
            options = allowed(constraint.mask())
            assert len(options), f"no way on after {self.tokenizer.decode(ids)!r}"
            if self.rng.random() < self.haste and (closing := options[self._closes[options]]).size:
                options = closing
            token = int(options[self.rng.randrange(len(options))])
            if token in self.tokenizer.stop_ids:
                return ids
            constraint.accept(token)
            ids.append(token)
        return None
