"""Prompt lookup: the text itself says what may come next (no draft model).

Where the last few tokens stood before, the tokens that followed them there are the draft. Any draft is safe: the device
draws every position as it would have without it and keeps what agrees (``inference.sampling``).
"""

from __future__ import annotations

from collections.abc import Iterable

NGRAMS = (4, 3, 2)  # how many of the last tokens have to agree: the more, the surer


class Drafter:
    """The tokens of one sequence, and after which n-grams each of them came last."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            for gram in self._last_grams():
                self._after[gram] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` tokens. A repetition that reaches the end of the text is taken to go on."""
        if most < 1:
            return []
        for gram in self._last_grams():
            if (start := self._after.get(gram)) is not None:
                found = self._tokens[start : start + most]
                return [found[i % len(found)] for i in range(most)]
        return []

    def _last_grams(self) -> list[tuple[int, ...]]:
        return [tuple(self._tokens[-n:]) for n in NGRAMS if n <= len(self._tokens)]
