"""How much the engine may hold and a step may do, and the sizes that steps are padded to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from kimi_jax.errors import UserError


@dataclass(frozen=True)
class Limits:
    """A step has at most ``max_rows`` rows and ``step_tokens`` tokens, padding included."""

    n_pages: int  # of the latent cache, page 0 included, which is padding
    page_size: int  # tokens
    max_len: int  # tokens of a prompt and its continuation
    vocab_size: int
    max_rows: int = 64
    step_tokens: int = 1024
    draft: int = 0  # tokens that prompt lookup may add to a row
    max_wait_s: float = math.inf  # a request that waits longer for its start is refused
    age_s: float = 10.0  # seconds of waiting that weigh as much as one step of priority

    def __post_init__(self):
        least = {"n_pages": 2, "page_size": 1, "max_len": 1, "vocab_size": 1, "max_rows": 1, "draft": 0}
        least |= {"step_tokens": self.max_rows, "max_wait_s": 0, "age_s": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.draft >= self.step_tokens:
            raise UserError(f"draft must be less than step_tokens ({self.step_tokens}), not {self.draft}")

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return (self.n_pages - 1) * self.page_size

    @property
    def most_tokens(self) -> int:
        """Of one sequence: the cache has to hold all but the last."""
        return min(self.max_len, self.capacity + 1)

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return sizes(1, self.max_rows)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Tokens of a row in a prefill step."""
        return sizes(16, self.step_tokens)

    @cached_property
    def page_tables(self) -> tuple[int, ...]:
        """Few sizes: their width costs the device next to nothing, and each is a program of its own."""
        return sizes(8, self.pages_for(min(self.max_len, self.capacity)), 8)


def sizes(least: int, most: int, factor: int = 2) -> tuple[int, ...]:
    """least, least * factor, ... and ``most``."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return (*found, most)


def padded(n: int, to: tuple[int, ...]) -> int:
    """The smallest size that holds ``n``."""
    return next(size for size in to if size >= n)
