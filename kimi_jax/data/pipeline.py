"""From sources to batches. A batch is a function of (data, seed, global step) alone, at any number of processes.

Each source is tokenised once and cut into sequences (``packing``); Grain shuffles every source anew each epoch, repeats
it, and mixes the sources by weight, all by random access: row r of step s is element s*B + r of one endless sequence.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grain
import numpy as np

from kimi_jax.data.packing import Batch, n_sequences, pack
from kimi_jax.data.sources import STDLIB, Document, SourceConfig, documents, split
from kimi_jax.data.store import TokenStore, cache_key, cached, tokenize
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on and what to hold out.

    ``sources``: none means the embedded corpus, the running Python's standard library.
    ``eval_sources``: the held-out text; none means the share ``holdout`` of the documents of ``sources``.
    ``tokenizer``: ``"bytes"``, or the path of a ``tiktoken.model``.
    ``cache``: directory for tokenised sources; none keeps them in memory.
    """

    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = "bytes"
    holdout: float = 0.05
    cache: str | None = None
    shuffle: bool = True

    def __post_init__(self):
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout must lie in 0..1 (1 excluded), not {self.holdout}")

    def parts(self, which: Split) -> Iterator[tuple[SourceConfig, float, bool]]:
        """The sources of a split, and how each is cut: the share held out, and which side of it is meant."""
        sources = self.sources or (SourceConfig(STDLIB),)
        for source in self.eval_sources or sources if which == "eval" else sources:
            share = 0.0 if self.eval_sources else self.holdout
            yield source, share, which == "eval" and not self.eval_sources


def split_bytes(cfg: DataConfig, which: Split) -> Iterator[bytes]:
    """The UTF-8 bytes of every document of a split."""
    for source, share, held_out in cfg.parts(which):
        for document in split(documents(source), share, held_out):
            yield document.text.encode()


class TrainData:
    """Training batches of ``batch_size`` sequences (over all processes) of ``seq_len`` tokens."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, *, batch_size: int, seq_len: int, seed: int):
        _check_sizes(batch_size, seq_len)
        self.batch_size = batch_size
        parts, weights = [], []
        for i, (source, share, held_out) in enumerate(cfg.parts("train")):
            store = _store(cfg, source, share, held_out, tokenizer)
            if not len(store.tokens):
                raise UserError(f"data source {source.path} holds no text")
            sequences = grain.MapDataset.source(_Sequences((store,), seq_len, tokenizer.pad))
            if cfg.shuffle:
                sequences = sequences.shuffle(seed=_source_seed(seed, i))
            parts.append(sequences.repeat())
            weights.append(source.weight)
        self._sequences = grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Those rows of global batch ``step``, each field [len(rows), T]."""
        return _stack(self._sequences[step * self.batch_size + row] for row in rows)

    def iter_rows(self, start_step: int, rows: Sequence[int]) -> Iterator[Batch]:
        """``rows(start_step, rows)``, ``rows(start_step + 1, rows)``, ... without end, prepared ahead by a thread."""
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        batches = steps.map(lambda step: self.rows(step, rows))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


class EvalData:
    """The held-out text in order, in batches to be read any number of times; the last is filled up with weight 0.

    ``max_batches`` takes that many batches of sequences spread evenly over all of it.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Tokenizer, *, batch_size: int, seq_len: int, max_batches: int | None = None
    ):
        _check_sizes(batch_size, seq_len)
        self.batch_size = batch_size
        stores = [_store(cfg, *part, tokenizer) for part in cfg.parts("eval")]
        self._sequences = _Sequences(stores, seq_len, tokenizer.pad)
        self._picked = len(self._sequences) if max_batches is None else max_batches * batch_size
        self._picked = min(self._picked, len(self._sequences))
        if len(self._sequences):
            return
        if cfg.eval_sources:
            raise UserError("data.eval_sources hold no text")
        raise UserError(
            f"no document falls into the held-out share {cfg.holdout}: set data.eval_sources, or raise data.holdout "
            "if there are several documents"
        )

    def __len__(self) -> int:
        return -(-self._picked // self.batch_size)

    def rows(self, i: int, rows: Sequence[int]) -> Batch:
        """Those rows of global batch ``i``, each field [len(rows), T]."""
        assert 0 <= i < len(self)
        n = len(self._sequences)
        places = (i * self.batch_size + row for row in rows)
        return _stack(self._sequences[place * n // self._picked if place < self._picked else n] for place in places)


class _Sequences:
    """The packed sequences of some stores, one store after the other; index ``len`` is a row of padding."""

    def __init__(self, stores: Sequence[TokenStore], seq_len: int, pad: int):
        self._stores, self._seq_len, self._pad = stores, seq_len, pad
        self._ends = np.cumsum([n_sequences(len(store.tokens), seq_len) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        k = min(int(np.searchsorted(self._ends, index, side="right")), len(self._stores) - 1)
        before = int(self._ends[k - 1]) if k else 0
        return pack(*self._stores[k], index - before, self._seq_len, self._pad)


def _store(cfg: DataConfig, source: SourceConfig, share: float, held_out: bool, tokenizer: Tokenizer) -> TokenStore:
    found: Iterable[Document] = split(documents(source), share, held_out)
    if cfg.cache is None:
        return tokenize(found, tokenizer)
    return cached(cfg.cache, cache_key(source, tokenizer, share, held_out), found, tokenizer)


def _source_seed(seed: int, source: int) -> int:
    """32 bits of a hash: Grain shuffles epoch e with seed + e, so neighbouring seeds would repeat each other."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=4).digest(), "big")


def _stack(rows: Iterable[Any]) -> Batch:
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def _check_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise UserError(f"batch size and sequence length must be at least 1, not {batch_size} and {seq_len}")
