"""Which page holds the latents of a prefix that was computed before.

The content of a page depends on all tokens up to its end, and so does its key:

    key_i = hash(key_{i-1}, tokens of page i)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def chain(keys: list[bytes], tokens: Sequence[int], page_size: int, n_pages: int) -> list[bytes]:
    """``keys`` of the first pages, extended in place to ``n_pages``, all of them full."""
    for i in range(len(keys), n_pages):
        content = np.asarray(tokens[i * page_size : (i + 1) * page_size], "<i4")
        assert len(content) == page_size
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + content.tobytes(), digest_size=16).digest())
    return keys


class PrefixCache:
    """Key to page and back. Of the pages that nobody holds, the one whose last use is longest ago goes first."""

    def __init__(self):
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages nobody holds, least recently used first

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def add(self, page: int, key: bytes) -> None:
        """Another page with the same content keeps its place: this one is then not shared."""
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def hold(self, page: int) -> None:
        self._idle.pop(page, None)

    def let_go(self, page: int) -> None:
        self._idle[page] = None

    def evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
