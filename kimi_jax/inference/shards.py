"""Where a sequence runs: the rows and pages of each shard, what they hold, and which shard takes the next sequence.

A sequence stays in the shard in which it starts, since its latents are there; after a preemption it may start again in
another one. Nobody has to give way if that can be had; then a long shared prefix counts, then balance.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence as Many
from typing import NamedTuple

from kimi_jax.inference.limits import Limits
from kimi_jax.inference.pages import PagePool
from kimi_jax.inference.prefix import chain
from kimi_jax.inference.sequence import Rank, Sequence, by_rank

NOBODY: Rank = (math.inf, 0, 0)


class Offer(NamedTuple):
    """What it takes to start a sequence in a shard: the largest is the best."""

    spares: Rank  # everyone who ranks before this one
    shared: int  # pages of the prefix
    rows: int  # free
    pages: int  # free


class Shard:
    """``running`` sequences by rank, and their pages."""

    def __init__(self, index: int, limits: Limits):
        self.index, self.limits = index, limits
        self.pool = PagePool(limits.n_pages)
        self.running: list[Sequence] = []

    @property
    def free_rows(self) -> int:
        return self.limits.rows_per_shard - len(self.running)

    def offer(self, sequence: Sequence, free_rows: int) -> Offer | None:
        """None if not even those that rank behind ``sequence`` have enough; ``free_rows``: of all shards together.

        A page that several of them hold is counted for each, so that an offer may turn out to be too good.
        """
        behind = [s for s in reversed(self.running) if s.rank > sequence.rank]
        n = max(0, 1 - min(free_rows, self.free_rows))  # have to give way
        if n > len(behind):
            return None
        shared, idle = self.pool.known(self._prefix(sequence))
        wanted = self.wanted(sequence, shared)
        free = self.pool.available - idle + sum(len(s.pages) for s in behind[:n])
        while free < wanted:
            if n == len(behind):
                return None
            free += len(behind[n].pages)
            n += 1
        return Offer(behind[n - 1].rank if n else NOBODY, shared, self.free_rows, free)

    def wanted(self, sequence: Sequence, shared: int) -> int:
        """Pages that must be free for a start: the prompt's, and one that each of those before it may need soon."""
        before = sum(s.rank < sequence.rank for s in self.running)
        return self.limits.pages_for(len(sequence.tokens)) - shared + before

    def share(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of what the sequence has to compute."""
        return self.pool.share(self._prefix(sequence))

    def start(self, sequence: Sequence, shared: list[int]) -> None:
        sequence.shard = self.index
        sequence.pages = shared + self.pool.take(self.limits.pages_for(len(sequence.tokens)) - len(shared))
        sequence.published = len(shared)
        sequence.planned = len(shared) * self.limits.page_size
        if not sequence.started:
            sequence.cached_tokens = sequence.planned
        sequence.started = sequence.running = True
        insort(self.running, sequence, key=by_rank)

    def stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.planned = sequence.published = 0
        sequence.running = False

    def missing(self, sequence: Sequence, n_tokens: int) -> int:
        """Pages, to hold so many tokens."""
        return max(0, self.limits.pages_for(n_tokens) - len(sequence.pages))

    def grow(self, sequence: Sequence, n_tokens: int) -> None:
        sequence.pages += self.pool.take(self.missing(sequence, n_tokens))

    def room(self, sequence: Sequence) -> int:
        """Tokens that the sequence may have, without anyone giving way."""
        return (len(sequence.pages) + self.pool.available) * self.limits.page_size

    def publish(self, sequence: Sequence, computed: int) -> None:
        """Lets others share the pages that are now full."""
        n = min(computed, len(sequence.tokens)) // self.limits.page_size
        keys = chain(sequence.keys, sequence.tokens, self.limits.page_size, n)
        for i in range(sequence.published, n):
            self.pool.publish(sequence.pages[i], keys[i])
        sequence.published = max(sequence.published, n)

    def _prefix(self, sequence: Sequence) -> list[bytes]:
        """Keys of pages that need not be computed: one token at least is, to sample, and all if they are scored."""
        n = (len(sequence.tokens) - 1) // self.limits.page_size if sequence.scored else 0
        return chain(sequence.keys, sequence.tokens, self.limits.page_size, n)[:n]


def best(shards: Many[Shard], sequence: Sequence, free_rows: int) -> Shard | None:
    """The shard with the best offer; None: the sequence has to wait."""
    offers = [(offer, -s.index) for s in shards if (offer := s.offer(sequence, free_rows)) is not None]
    return shards[-max(offers)[1]] if offers else None
