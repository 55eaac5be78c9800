"""An order-2 byte model: the yardstick that a trained model must beat on the same held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from kimi_jax.errors import UserError

START = 256  # stands for the two bytes before a document
CONTEXTS = 257
CHUNK = 4 << 20  # bytes of a document that are counted together


class First:
    """Documents up to the one with which ``most`` bytes are reached; ``cut`` says whether that left any out."""

    def __init__(self, documents: Iterable[bytes], most: int):
        self._documents, self._most, self.cut = documents, most, False

    def __iter__(self) -> Iterator[bytes]:
        total = 0
        for document in self._documents:
            self.cut = total >= self._most
            if self.cut:
                return
            total += len(document)
            yield document


def order2_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Mean of -log2 p(c | a, b) over the bytes c of ``held_out``, where a, b are the two bytes before c.

    Counts n come from ``train``. Each order falls back on the one below by Witten-Bell interpolation, t being the
    number of distinct bytes seen after a context:

        p(c | a, b) = (n(abc) + t(ab) p(c | b)) / (n(ab) + t(ab))
        p(c | b)    = (n(bc)  + t(b)  p(c))     / (n(b)  + t(b))
        p(c)        = (n(c)   + t / 256)        / (n     + t)

    The bytes before a document are a start symbol; its end is not predicted. Memory holds the counts, and one document.
    """
    n_ABC = _counts(train).reshape(CONTEXTS, CONTEXTS, 256)
    n_BC = n_ABC.sum(0)
    p_C = _interpolate(n_BC.sum(0), np.full(256, 1 / 256))
    p_BC = _interpolate(n_BC, p_C)

    counts = _counts(held_out)
    seen = np.flatnonzero(counts)
    if not len(seen):
        raise UserError("there is no held-out text to measure; set data.eval_sources or raise data.holdout")
    context, c = np.divmod(seen, 256)
    a, b = np.divmod(context, CONTEXTS)
    n_AB, t_AB = _totals(n_ABC)
    p = (n_ABC[a, b, c] + t_AB[a, b] * p_BC[b, c]) / (n_AB + t_AB)[a, b]
    return float(np.average(-np.log2(p), weights=counts[seen]))


def _totals(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """n and t of each context; t = 1 where nothing was seen, so that the lower order decides alone."""
    return n.sum(-1), np.maximum(np.count_nonzero(n, axis=-1), 1)


def _interpolate(n: np.ndarray, lower: np.ndarray) -> np.ndarray:
    total, distinct = _totals(n)
    return (n + distinct[..., None] * lower) / (total + distinct)[..., None]


def _counts(documents: Iterable[bytes]) -> np.ndarray:
    """How often each (a * 257 + b) * 256 + c occurs, int64 [257 * 257 * 256]."""
    n = np.zeros(CONTEXTS * CONTEXTS * 256, np.int64)
    for document in documents:
        for trigrams in _trigrams(document):
            np.add.at(n, trigrams, 1)
    return n


def _trigrams(document: bytes) -> Iterator[np.ndarray]:
    """(a * 257 + b) * 256 + c of every byte c, int64, ``CHUNK`` bytes at a time."""
    for start in range(0, len(document), CHUNK):
        before = [START, START, *document[max(start - 2, 0) : start]][-2:]
        x = np.concatenate([before, np.frombuffer(document[start : start + CHUNK], np.uint8)])
        yield (x[:-2] * CONTEXTS + x[1:-1]) * 256 + x[2:]
