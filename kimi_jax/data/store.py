"""Token store: a corpus tokenised once, in memory or in a memory-mapped cache that is reused while its sources stay.

A cache entry is a directory ``<key>/`` of ``tokens.bin``, ``offsets.npy`` and ``manifest.json``. It is written under a
temporary name, the manifest last, and then renamed, so that an interrupted run leaves nothing that reads as an entry.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_jax.data.sources import Document, SourceConfig, files
from kimi_jax.data.tokenizer import MAX_CHARS, Tokenizer
from kimi_jax.errors import UserError, os_errors_as

FORMAT_VERSION = 1
ENDS = 4096  # bytes at both ends of a file that tell it from another of its name, size and time


class TokenStore(NamedTuple):
    """``tokens`` [N]: every document followed by EOS; ``offsets`` [n_documents + 1]: where each begins, then N."""

    tokens: np.ndarray  # uint16 or uint32
    offsets: np.ndarray  # int64


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
    """The token store of ``documents``, in memory."""
    pieces = list(_token_arrays(documents, tokenizer))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, _dtype(tokenizer))
    return TokenStore(tokens, _offsets([len(piece) for piece in pieces]))


def cached(cache: str | Path, key: str, documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
    """The token store kept under ``key`` in the directory ``cache``, written from ``documents`` if it is not there."""
    entry = Path(cache).expanduser() / key
    try:
        if not entry.exists():
            _build(entry, documents, tokenizer)
    except OSError as error:
        raise UserError(f"cannot write the token cache {cache}: {error.strerror}; change data.cache") from error
    return _read(entry)


def cache_key(source: SourceConfig, tokenizer: Tokenizer, *split: object) -> str:
    """A digest of what decides the tokens: each file's name, size, time and ends, how it is read, and the split."""
    stats = []
    for file in files(source):
        with os_errors_as(f"cannot read {file.path}"), open(file.path, "rb") as opened:
            stat, first = os.fstat(opened.fileno()), opened.read(ENDS)
            opened.seek(max(stat.st_size - ENDS, 0))
            ends = hashlib.sha256(first + opened.read(ENDS)).hexdigest()
        stats.append((file.name, stat.st_size, stat.st_mtime_ns, ends))
    described = [FORMAT_VERSION, stats, source.format, source.key, tokenizer.identity, split]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _token_arrays(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """One array a document. Ids are Python objects, of many bytes each, for ``MAX_CHARS`` at a time alone."""
    dtype = _dtype(tokenizer)
    for _, text in documents:
        parts = (text[start : start + MAX_CHARS] for start in range(0, len(text), MAX_CHARS))
        ids = itertools.chain(map(tokenizer.encode, parts), [[tokenizer.eos]])
        yield np.concatenate([np.array(part, dtype) for part in ids])


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _build(entry: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    """Writes the entry, and removes what others, killed or slower, have written of it."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f".{entry.name}-{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        _write(partial, documents, tokenizer)
        partial.rename(entry)
    except OSError:
        if not entry.exists():  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for left in entry.parent.glob(f".{entry.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(directory: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    lengths = []
    with open(directory / "tokens.bin", "wb") as file:
        for piece in _token_arrays(documents, tokenizer):
            file.write(piece.tobytes())
            lengths.append(len(piece))
        _sync(file)
    with open(directory / "offsets.npy", "wb") as file:
        np.save(file, _offsets(lengths))
        _sync(file)
    with open(directory / "manifest.json", "w", encoding="utf-8") as file:
        json.dump({"dtype": _dtype(tokenizer), "n_tokens": sum(lengths), "n_documents": len(lengths)}, file)
        _sync(file)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(entry: Path) -> TokenStore:
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        n_tokens, dtype = manifest["n_tokens"], np.dtype(manifest["dtype"])
        offsets = np.load(entry / "offsets.npy")
        size = (entry / "tokens.bin").stat().st_size
        whole = len(offsets) == manifest["n_documents"] + 1 and offsets[-1] == n_tokens
        if not whole or size != n_tokens * dtype.itemsize:
            raise ValueError
        tokens = np.memmap(entry / "tokens.bin", dtype, "r") if n_tokens else np.zeros(0, dtype)
    except PermissionError as error:
        raise UserError(f"cannot read the token cache entry {entry}: {error.strerror}; change data.cache") from error
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the token cache entry {entry} is damaged; delete it") from error
    return TokenStore(tokens, offsets)
