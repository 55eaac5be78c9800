"""The token store, in memory and cached on disk."""

import base64
import dataclasses
import errno
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kimi_jax.data import store, tokenizer
from kimi_jax.data.sources import Document, SourceConfig, documents
from kimi_jax.errors import UserError

BYTES = tokenizer.load("bytes")
DOCUMENTS = [Document("a", "hé"), Document("b", ""), Document("c", "xyz")]
TOKENS = [*"hé".encode(), 257, 257, *b"xyz", 257]


def never():
    raise AssertionError("read although cached")
    yield


def test_documents_end_with_eos():
    tokens, offsets = store.tokenize(DOCUMENTS, BYTES)
    assert tokens.tolist() == TOKENS and tokens.dtype == np.uint16
    assert offsets.tolist() == [0, 4, 5, 9] and offsets.dtype == np.int64


def test_wide_vocabularies_take_32_bits():
    @dataclasses.dataclass(frozen=True)
    class Wide(tokenizer.ByteTokenizer):
        vocab_size = 70_000
        eos = 69_999

    tokens, _ = store.tokenize(DOCUMENTS, Wide())
    assert tokens.dtype == np.uint32 and tokens[-1] == 69_999


def test_a_long_document_takes_a_few_bytes_a_character():
    text = "".join(map(chr, np.random.default_rng(0).integers(1, 128, 3_000_000)))
    tracemalloc.start()
    tokens, offsets = store.tokenize([Document("a", text)], BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens.tobytes() == np.array([*text.encode(), 257], np.uint16).tobytes()
    assert offsets.tolist() == [0, 3_000_001]
    assert peak < 8 * len(text)


@pytest.mark.parametrize("name", ["bytes", "pairs"])
def test_long_documents_have_the_ids_of_their_text(tmp_path, name):
    """Not of texts that are cut elsewhere than where the reference encoder cuts."""
    pairs = b"\n".join(
        base64.b64encode(bytes(p)) + b" %d" % i for i, p in enumerate([*([b] for b in range(256)), b"ab"])
    )
    (tmp_path / "tiktoken.model").write_bytes(pairs)
    encoder = BYTES if name == "bytes" else tokenizer.load(str(tmp_path))
    for text in ("ab" * 500_000, "é ab" * 250_001, " ab[EOS]" * 110_000):
        tokens, _ = store.tokenize([Document("a", text)], encoder)
        assert tokens.tolist() == [*encoder.encode(text), encoder.eos]


@pytest.mark.parametrize("docs", [DOCUMENTS, []])
def test_cached_equals_memory_and_is_reused(tmp_path, docs):
    want = store.tokenize(docs, BYTES)
    cache = tmp_path / "made" / "here"
    for found in (iter(docs), never()):
        got = store.cached(cache, "key", found, BYTES)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    assert [p.name for p in cache.iterdir()] == ["key"]


def test_an_interrupted_write_leaves_no_entry(tmp_path):
    def broken():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.cached(tmp_path, "key", broken(), BYTES)
    assert not list(tmp_path.iterdir())
    assert store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES).tokens.tolist() == TOKENS


def test_what_a_killed_writer_left_is_not_read(tmp_path):
    partial = tmp_path / ".key-abc"
    partial.mkdir()
    (partial / "tokens.bin").write_bytes(b"\0\0")
    assert store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES).tokens.tolist() == TOKENS
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o750


def test_an_entry_of_somebody_else(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES)
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(UserError, match="cannot read the token cache entry .*key: Permission denied"):
        store.cached(tmp_path, "key", never(), BYTES)


def test_two_writers_at_once(tmp_path):
    def slow():
        store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES)
        yield from DOCUMENTS

    assert store.cached(tmp_path, "key", slow(), BYTES).tokens.tolist() == TOKENS
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
def test_a_damaged_entry_is_refused(tmp_path, name, damage):
    store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES)
    path = tmp_path / "key" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "short" else b"")
    with pytest.raises(UserError, match="token cache entry .*key is damaged; delete it"):
        store.cached(tmp_path, "key", never(), BYTES)


def test_offsets_of_another_corpus_are_refused(tmp_path):
    store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES)
    np.save(tmp_path / "key" / "offsets.npy", np.array([0, 4, 5, 8]))
    with pytest.raises(UserError, match="is damaged"):
        store.cached(tmp_path, "key", never(), BYTES)


def test_a_manifest_of_another_shape_is_refused(tmp_path):
    store.cached(tmp_path, "key", iter(DOCUMENTS), BYTES)
    (tmp_path / "key" / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="is damaged"):
        store.cached(tmp_path, "key", never(), BYTES)


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the token cache .*change data.cache"):
        store.cached(tmp_path / "file", "key", iter(DOCUMENTS), BYTES)


def test_errors_of_the_documents_pass_through_the_cache(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="a.txt is not UTF-8"):
        store.cached(tmp_path / "cache", "key", documents(SourceConfig(str(tmp_path / "a.txt"))), BYTES)


def test_the_key_follows_everything_that_decides_the_tokens(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}')
    source = SourceConfig(str(path))
    os.utime(path, ns=(10**18, 10**18))

    @dataclasses.dataclass(frozen=True)
    class Other(tokenizer.ByteTokenizer):
        identity: str = "other"

    keys = [
        store.cache_key(source, BYTES, 0.05, False),
        store.cache_key(source, BYTES, 0.05, True),
        store.cache_key(source, BYTES, 0.1, False),
        store.cache_key(source, Other(), 0.05, False),
        store.cache_key(dataclasses.replace(source, key="y"), BYTES, 0.05, False),
        store.cache_key(dataclasses.replace(source, format="text"), BYTES, 0.05, False),
    ]
    assert store.cache_key(dataclasses.replace(source, weight=2.0), BYTES, 0.05, False) == keys[0]
    os.utime(path, ns=(10**18, 10**18 + 1000))
    keys.append(store.cache_key(source, BYTES, 0.05, False))
    path.write_text('{"text": "xy"}')
    os.utime(path, ns=(10**18, 10**18))
    keys.append(store.cache_key(source, BYTES, 0.05, False))
    path.rename(tmp_path / "b.jsonl")
    keys.append(store.cache_key(SourceConfig(str(tmp_path / "b.jsonl")), BYTES, 0.05, False))
    assert len(set(keys)) == len(keys) == 9


@pytest.mark.parametrize("at", [0, 9_999])
def test_the_key_tells_files_of_one_name_size_and_time_apart(tmp_path, at):
    def key(folder, content):
        path = tmp_path / folder / "a.txt"
        path.parent.mkdir()
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        return store.cache_key(SourceConfig(str(path)), BYTES)

    content = bytearray(b"x" * 10_000)
    first = key("first", content)
    assert key("moved", content) == first
    content[at] = ord("y")
    assert key("second", content) != first
