"""An order-2 byte model: the yardstick that a trained model must beat on the same held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kimi_jax.errors import UserError

START = 256  # stands for the two bytes before a document
CONTEXTS = 257


def order2_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Mean of -log2 p(c | a, b) over the bytes c of ``held_out``, where a, b are the two bytes before c.

    Counts n come from ``train``. Each order falls back on the one below by Witten-Bell interpolation, t being the
    number of distinct bytes seen after a context:

        p(c | a, b) = (n(abc) + t(ab) p(c | b)) / (n(ab) + t(ab))
        p(c | b)    = (n(bc)  + t(b)  p(c))     / (n(b)  + t(b))
        p(c)        = (n(c)   + t / 256)        / (n     + t)

    The bytes before a document are a start symbol; its end is not predicted. Both texts are held in memory.
    """
    n_ABC = np.bincount(_trigrams(train), minlength=CONTEXTS * CONTEXTS * 256).reshape(CONTEXTS, CONTEXTS, 256)
    n_BC = n_ABC.sum(0)
    p_C = _interpolate(n_BC.sum(0), np.full(256, 1 / 256))
    p_BC = _interpolate(n_BC, p_C)

    seen = _trigrams(held_out)
    if not len(seen):
        raise UserError("there is no held-out text to measure; set data.eval_sources or raise data.holdout")
    context, c = np.divmod(seen, 256)
    a, b = np.divmod(context, CONTEXTS)
    n_AB, t_AB = _totals(n_ABC)
    p = (n_ABC[a, b, c] + t_AB[a, b] * p_BC[b, c]) / (n_AB + t_AB)[a, b]
    return float(-np.log2(p).mean())


def _totals(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """n and t of each context; t = 1 where nothing was seen, so that the lower order decides alone."""
    return n.sum(-1), np.maximum(np.count_nonzero(n, axis=-1), 1)


def _interpolate(n: np.ndarray, lower: np.ndarray) -> np.ndarray:
    total, distinct = _totals(n)
    return (n + distinct[..., None] * lower) / (total + distinct)[..., None]


def _trigrams(documents: Iterable[bytes]) -> np.ndarray:
    """(a * 257 + b) * 256 + c of every byte c, int64 [number of bytes]."""
    documents = list(documents)
    x = np.frombuffer(b"".join(b"\0\0" + document for document in documents), np.uint8).astype(np.int64)
    sizes = np.array([len(document) + 2 for document in documents], np.int64)
    starts = np.cumsum(sizes) - sizes
    x[starts] = x[starts + 1] = START
    trigram = (x[:-2] * CONTEXTS + x[1:-1]) * 256 + x[2:]
    return trigram[x[2:] != START]
