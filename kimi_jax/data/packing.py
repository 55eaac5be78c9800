"""Packing: documents laid end to end, cut every T tokens, each piece of a document kept apart by its segment id.

The stream of a corpus is document 0, EOS, document 1, EOS, ... of N tokens in all; ``offsets`` marks where each
document begins and ends with N. A training example is the pair (stream[j], stream[j + 1]), j = 0..N-2, and sequence i
holds the T pairs from j = i*T on. So an epoch of ceil((N - 1) / T) sequences holds every pair exactly once: nothing is
dropped and nothing repeated; only the last sequence is padded, and the last EOS is a target only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """One sequence [T], or a batch of them [B, T].

    ``targets`` is the next token. ``segment_ids`` counts the document pieces of a sequence from 1; 0 is padding.
    ``positions`` restarts at 0 at each piece. ``weights`` is the loss weight: 1 where the target belongs to the token's
    own document, 0 after an EOS and on padding. The fields are numpy arrays here, and JAX arrays once on devices.
    """

    tokens: Any  # int32
    targets: Any  # int32
    segment_ids: Any  # int32
    positions: Any  # int32
    weights: Any  # float32


def n_sequences(n_tokens: int, seq_len: int) -> int:
    """Sequences in one epoch over a stream of ``n_tokens``: ceil((N - 1) / T)."""
    return max(0, -(-(n_tokens - 1) // seq_len))


def pack(stream: np.ndarray, offsets: np.ndarray, i: int, seq_len: int, pad: int = 0) -> Batch:
    """Sequence ``i``, each field [T]; beyond the end of the stream it is all padding."""
    start = i * seq_len
    real = np.arange(seq_len) < len(stream) - 1 - start
    window = np.full(seq_len + 1, pad, np.int32)
    found = stream[start : start + seq_len + 1]
    window[: len(found)] = found

    begins = np.zeros(seq_len + 1, bool)  # where a document begins
    low, high = np.searchsorted(offsets, (start, start + seq_len + 1))
    begins[offsets[low:high] - start] = True
    index = np.arange(seq_len)
    begin = np.maximum.accumulate(np.where(begins[:-1], index, 0))
    segment_ids = 1 + np.cumsum(begins[:-1]) - begins[0]
    return Batch(
        tokens=np.where(real, window[:-1], pad).astype(np.int32),
        targets=np.where(real, window[1:], pad).astype(np.int32),
        segment_ids=np.where(real, segment_ids, 0).astype(np.int32),
        positions=np.where(real, index - begin, 0).astype(np.int32),
        weights=(real & ~begins[1:]).astype(np.float32),
    )
