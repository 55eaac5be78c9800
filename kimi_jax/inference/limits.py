"""How much the engine may hold and a step may do, and the sizes that steps are padded to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from kimi_jax.errors import UserError
from kimi_jax.inference.request import Request


@dataclass(frozen=True)
class Limits:
    """A step has at most ``max_rows`` rows and ``step_tokens`` tokens, padding included.

    The cache and the rows are split over ``shards``; a sequence lives in one of them.
    """

    n_pages: int  # of a shard's latent cache, page 0 included, which is padding
    page_size: int  # tokens
    max_len: int  # tokens of a prompt and its continuation
    vocab_size: int
    max_rows: int = 64
    shards: int = 1
    step_tokens: int = 1024
    draft: int = 0  # tokens that prompt lookup may add to a row
    max_wait_s: float = math.inf  # a request that waits longer for its start is refused
    age_s: float = 10.0  # seconds of waiting that weigh as much as one step of priority

    def __post_init__(self):
        least = {"n_pages": 2, "page_size": 1, "max_len": 1, "vocab_size": 1, "max_rows": 1, "shards": 1, "draft": 0}
        least |= {"step_tokens": self.max_rows, "max_wait_s": 0, "age_s": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if math.isinf(self.age_s):
            raise UserError("age_s must be finite: with many seconds, such as 1e9, only priorities count")
        if self.draft >= self.step_tokens:
            raise UserError(f"draft must be less than step_tokens ({self.step_tokens}), not {self.draft}")

    @property
    def capacity(self) -> int:
        """Tokens that a shard's cache holds, and so the most for one sequence."""
        return (self.n_pages - 1) * self.page_size

    @property
    def most_tokens(self) -> int:
        """Of one sequence: the cache has to hold all but the last."""
        return min(self.max_len, self.capacity + 1)

    def check(self, request: Request) -> None:
        """``UserError`` for a request that can never be served."""
        size, wanted = len(request.prompt), 1 if request.max_tokens is None else request.max_tokens
        ids = {"prompt": request.prompt, "stop_ids": request.stop_ids, "logit_bias": request.sampling.logit_bias}
        for name, tokens in ids.items():
            if tokens and max(tokens) >= self.vocab_size:
                raise UserError(f"{name}: token ids must be less than {self.vocab_size}, not {max(tokens)}")
        asked = f"prompt of {size} tokens and max_tokens {wanted}"
        if size + wanted > self.max_len:
            raise UserError(f"{asked} are more than max_len, {self.max_len}")
        if size + max(wanted, 1) - 1 > self.capacity:  # the last token is not computed
            raise UserError(f"{asked}: the cache holds {self.capacity} in all")

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    @property
    def rows_per_shard(self) -> int:
        return -(-self.max_rows // self.shards)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of a decode step."""
        return sizes(1, self.max_rows)

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of a step in one shard."""
        return sizes(1, self.rows_per_shard)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Tokens of a row in a prefill step."""
        return sizes(16, self.step_tokens)

    def rows_of_width(self, T: int) -> int:
        """The most rows of a step whose rows have ``T`` tokens."""
        return max(size for size in self.rows if size * T <= self.step_tokens)

    def chunk_rows(self, T: int) -> tuple[int, ...]:
        """Of a prefill step with chunks of ``T`` tokens: few sizes, each is a program of its own."""
        return sizes(1, self.rows_of_width(T), 4)

    @cached_property
    def lists(self) -> tuple[int, ...]:
        """Tokens with penalties or a bias of their own, per row."""
        return sizes(64, max(self.vocab_size, 64), 16)

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
