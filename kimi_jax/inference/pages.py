"""The pages of one shard's latent cache: who holds how many, which are free, which may be shared.

Only full pages of computed tokens are shared, and a sequence writes behind its full pages alone. A shared page is thus
never written, and nothing is ever copied. Page 0 is padding and never handed out.

Pages may be given back while a step that writes to them is still in flight: the device runs steps in order, so whoever
gets them next writes later. Pages are shared only after the step that filled them is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kimi_jax.inference.prefix import PrefixCache


class PagePool:
    """Every page but 0 is held (by one or more), cached (held by nobody, content kept) or free."""

    def __init__(self, n_pages: int):
        self.n_pages = n_pages - 1
        self._free = list(range(n_pages - 1, 0, -1))
        self._holders = [0] * n_pages
        self._prefixes = PrefixCache()

    @property
    def available(self) -> int:
        """How many pages ``take`` can give."""
        return len(self._free) + self._prefixes.n_idle

    @property
    def in_use(self) -> int:
        return self.n_pages - self.available

    def take(self, n: int) -> list[int]:
        """``n`` pages with one holder each; cached ones lose their content once no other is free."""
        assert 0 <= n <= self.available, (n, self.available)
        pages = [self._free.pop() if self._free else self._prefixes.evict() for _ in range(n)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def known(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """Pages that ``share`` would find, and how many of them it would take from those available."""
        pages = self._prefixes.find(keys)
        return len(pages), sum(self._holders[page] == 0 for page in pages)

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known prefix, with one holder more."""
        pages = self._prefixes.find(keys)
        for page in pages:
            self._holders[page] += 1
            self._prefixes.hold(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """From now on others may share the page: it is full, computed, and not written again."""
        assert self._holders[page] > 0
        if page not in self._prefixes:
            self._prefixes.add(page, key)

    def release(self, pages: Sequence[int]) -> None:
        """Ends one holder's use. The end of a prefix is evicted before its beginning, without which it is no use."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} was given back twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._prefixes:
                    self._prefixes.let_go(page)
                else:
                    self._free.append(page)
