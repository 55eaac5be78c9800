"""Batches: a function of (data, seed, step) alone; every sequence once an epoch; mixtures; the held-out part."""

import dataclasses
import random
import string
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from kimi_jax.config import from_dict
from kimi_jax.data import tokenizer as tk
from kimi_jax.data.packing import Batch
from kimi_jax.data.pipeline import DataConfig, EvalData, TrainData, split_bytes
from kimi_jax.data.sources import SourceConfig, documents
from kimi_jax.errors import UserError

BYTES = tk.load("bytes")
T = 16


def write(directory, sizes, seed=0):
    """Text files of these sizes, of random small letters."""
    rng = random.Random(seed)
    directory.mkdir()
    for i, size in enumerate(sizes):
        (directory / f"{i:03}.txt").write_text("".join(rng.choices(string.ascii_lowercase, k=size)))
    return SourceConfig(str(directory))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "corpus", [5, 40, 1, 17, 90, 33, 64, 2, 28, 51, 16, 15])


def data(source, *more, batch_size=4, seed=0, **options):
    cfg = DataConfig(sources=(source, *more), **({"holdout": 0.0} | options))
    return TrainData(cfg, BYTES, batch_size=batch_size, seq_len=T, seed=seed)


def batch(data, step):
    """All rows of one batch."""
    return data.rows(step, range(data.batch_size))


def batches(data):
    """All that is held out."""
    return (batch(data, i) for i in range(len(data)))


def assert_equal(a, b):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def rows(batches):
    return [tuple(map(bytes, row)) for batch in batches for row in zip(*batch, strict=True)]


def n_sequences(source):
    total = sum(len(d.text) + 1 for d in documents(source))
    return -(-(total - 1) // T)


def test_shapes_and_types(source):
    found = batch(data(source), 3)
    assert [x.shape for x in found] == [(4, T)] * 5
    assert [x.dtype for x in found] == [np.int32] * 4 + [np.float32]


def test_a_fresh_object_gives_the_same_batch_in_any_order(source):
    steps = [0, 7, 3, 10**6, 3]
    want = {step: batch(data(source), step) for step in set(steps)}
    same = data(source)
    for step in steps:
        assert_equal(batch(same, step), want[step])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_global_batch(source, process_count):
    for step in (0, 5):
        shares = np.arange(4).reshape(process_count, -1).tolist()
        parts = [data(source).rows(step, share) for share in shares]
        assert_equal(map(np.concatenate, zip(*parts, strict=True)), batch(data(source), step))


def test_iteration_resumes_where_it_stopped(source):
    whole = list(islice(data(source).iter_rows(0, range(4)), 9))
    for step, found in enumerate(whole):
        assert_equal(found, batch(data(source), step))
    for found, want in zip(data(source).iter_rows(4, range(4)), whole[4:], strict=False):
        assert_equal(found, want)
    for found, want in zip(data(source).iter_rows(2, range(2, 4)), whole[2:], strict=False):
        assert_equal(found, (x[2:] for x in want))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_epoch_is_another_permutation(source, batch_size):
    n = n_sequences(source)
    shuffled = data(source, batch_size=batch_size)
    found = rows(batch(shuffled, step) for step in range(-(-4 * n // batch_size)))
    epochs = [found[k * n : (k + 1) * n] for k in range(4)]
    ordered = rows(batch(data(source, batch_size=1, shuffle=False), step) for step in range(n))
    assert len(set(ordered)) == n
    assert all(Counter(epoch) == Counter(ordered) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, ordered)}) == 5


def test_seeds_differ_and_do_not_shift_into_each_other(source):
    n = n_sequences(source)
    epochs = set()
    for seed in (0, 1, 2, -1, 2**40):
        seeded = data(source, batch_size=n, seed=seed)
        epochs |= {tuple(rows([batch(seeded, step)])) for step in range(3)}
    assert len(epochs) == 15


def test_without_shuffling_the_stream_is_in_order(source):
    n = n_sequences(source)
    found = batch(data(source, batch_size=n, shuffle=False), 1)
    read = found.tokens[found.segment_ids > 0].tolist()
    stream = [token for d in documents(source) for token in (*d.text.encode(), BYTES.eos)]
    assert read == stream[:-1]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (0.3, 0.7), (20.0, 1.0)])
def test_mixtures_keep_their_weights(source, tmp_path, weights):
    path = tmp_path / "upper.txt"
    path.write_text("ABC" * 99)
    lower = dataclasses.replace(source, weight=weights[0])
    upper = SourceConfig(str(path), weight=weights[1])
    mixed = data(lower, upper, batch_size=420)
    share = (batch(mixed, 1).tokens < ord("a")).any(axis=1).mean()
    assert share == pytest.approx(weights[1] / sum(weights), rel=0.01)


def test_every_source_of_a_mixture_goes_through_its_own_epochs(source, tmp_path):
    path = tmp_path / "upper.txt"
    path.write_text("ABCD" * 30)
    mixed = data(source, SourceConfig(str(path)), batch_size=2)
    n = n_sequences(source)
    drawn = [row for row in rows(batch(mixed, step) for step in range(n)) if b"A" not in row[0]]
    assert Counter(drawn) == Counter(rows(batch(data(source, batch_size=1), step) for step in range(n)))


def test_a_cached_source_gives_the_same_batches(source, tmp_path):
    cache = str(tmp_path / "cache")
    for _ in range(2):
        assert_equal(batch(data(source, cache=cache), 2), batch(data(source), 2))


def test_embedded_corpus_is_the_default_and_splits_by_file():
    cfg = DataConfig()
    train, held_out = list(split_bytes(cfg, "train")), list(split_bytes(cfg, "eval"))
    everything = [d.text.encode() for d in documents(SourceConfig("stdlib"))]
    assert Counter(train + held_out) == Counter(everything)
    assert 0.01 < sum(map(len, held_out)) / sum(map(len, everything)) < 0.12
    evaluation = EvalData(cfg, BYTES, batch_size=64, seq_len=256)
    scored = sum(BYTES.token_bytes_V[b.targets][b.weights > 0].sum() for b in batches(evaluation))
    assert scored == sum(map(len, held_out)) - len(held_out)  # the first byte of a document is given


def test_training_and_held_out_documents_are_apart(source):
    cfg = DataConfig(sources=(source,), holdout=0.5)
    train, held_out = set(split_bytes(cfg, "train")), set(split_bytes(cfg, "eval"))
    assert train and held_out and not train & held_out
    assert train | held_out == {d.text.encode() for d in documents(source)}
    shuffled = TrainData(cfg, BYTES, batch_size=4, seq_len=4, seed=0)
    tokens = {row.tobytes() for step in range(100) for row in batch(shuffled, step).tokens}
    only = TrainData(dataclasses.replace(cfg, shuffle=False), BYTES, batch_size=1, seq_len=4, seed=0)
    total = sum(len(x) + 1 for x in train)
    assert tokens == {batch(only, i).tokens.tobytes() for i in range(-(-(total - 1) // 4))}


def test_separate_eval_sources_leave_all_sources_to_training(source, tmp_path):
    held_out = write(tmp_path / "other", [30, 40], seed=1)
    cfg = DataConfig(sources=(source,), eval_sources=(held_out,), holdout=0.9)
    assert list(split_bytes(cfg, "train")) == [d.text.encode() for d in documents(source)]
    assert list(split_bytes(cfg, "eval")) == [d.text.encode() for d in documents(held_out)]


def eval_data(*sources, batch_size=4, **options):
    cfg = DataConfig(sources=sources, eval_sources=sources)
    return EvalData(cfg, BYTES, batch_size=batch_size, seq_len=T, **options)


def test_evaluation_reads_every_held_out_token_once_in_order(source, tmp_path):
    other = write(tmp_path / "other", [30, 40], seed=1)
    evaluation = eval_data(source, other)
    n = n_sequences(source) + n_sequences(other)
    assert n % 4 and len(evaluation) == -(-n // 4)
    for _ in range(2):
        read = list(batches(evaluation))
        assert {x.shape for b in read for x in b} == {(4, T)}
        found = np.concatenate([b.tokens for b in read]), np.concatenate([b.segment_ids for b in read])
        real = found[0][found[1] > 0].tolist()
        want = []
        for s in (source, other):
            want += [token for d in documents(s) for token in (*d.text.encode(), BYTES.eos)][:-1]
        assert real == want
        last = read[-1]
        assert not last.weights[n % 4 :].any() and not last.segment_ids[n % 4 :].any()


def test_evaluation_over_processes(source):
    evaluation = eval_data(source)
    for i, whole in enumerate(batches(evaluation)):
        shares = evaluation.rows(i, range(2)), evaluation.rows(i, range(2, 4))
        assert_equal(map(np.concatenate, zip(*shares, strict=True)), whole)


def test_limited_evaluation_is_spread_over_the_text(source):
    n = n_sequences(source)
    everything = rows(batches(eval_data(source)))[:n]
    limited = eval_data(source, max_batches=2)
    assert len(limited) == 2
    assert rows(batches(limited)) == [everything[j * n // 8] for j in range(8)]
    assert rows(batches(eval_data(source, max_batches=10**6))) == rows(batches(eval_data(source)))


def test_one_document_is_trained_on_and_cannot_be_held_out(tmp_path):
    one = write(tmp_path / "one", [100])
    for holdout in (0.0, 0.05, 0.99):
        cfg = DataConfig(sources=(one,), holdout=holdout)
        assert batch(TrainData(cfg, BYTES, batch_size=2, seq_len=T, seed=0), 0).weights.any()
        with pytest.raises(UserError, match="held-out share .* set data.eval_sources, or raise data.holdout"):
            EvalData(cfg, BYTES, batch_size=2, seq_len=T)


def test_empty_corpora(source, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    empty = SourceConfig(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="empty.txt holds no text"):
        data(empty)
    with pytest.raises(UserError, match="empty.txt holds no text"):
        data(source, empty)
    with pytest.raises(UserError, match="data.eval_sources hold no text"):
        EvalData(DataConfig(eval_sources=(empty,)), BYTES, batch_size=2, seq_len=T)


def test_a_one_character_corpus_trains(tmp_path):
    (tmp_path / "tiny.txt").write_text("x")
    found = batch(data(SourceConfig(str(tmp_path / "tiny.txt"))), 0)
    assert found.tokens[:, 0].tolist() == [ord("x")] * 4
    assert found.weights.sum(axis=1).tolist() == [1.0] * 4


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_holdout_is_a_share(holdout):
    with pytest.raises(UserError, match="data.holdout must lie in"):
        DataConfig(holdout=holdout)


def test_sizes_are_positive(source):
    with pytest.raises(UserError, match="must be at least 1"):
        data(source, batch_size=0)
    with pytest.raises(UserError, match="must be at least 1"):
        EvalData(DataConfig(), BYTES, batch_size=1, seq_len=0)


def test_config_from_plain_values():
    values = {"sources": ["a.txt", {"path": "b", "weight": 2, "format": "jsonl"}], "eval_sources": ("c/*.md",)}
    assert from_dict(DataConfig, values, "data") == DataConfig(
        sources=(SourceConfig("a.txt"), SourceConfig("b", 2.0, "jsonl")), eval_sources=(SourceConfig("c/*.md"),)
    )
    with pytest.raises(UserError, match=r"unknown key data.sources\[0\].wieght; did you mean data.sources\[0\].weight"):
        from_dict(DataConfig, {"sources": [{"path": "a", "wieght": 1}]}, "data")
    with pytest.raises(UserError, match=r"data.sources\[0\] must be SourceConfig"):
        from_dict(DataConfig, {"sources": [3]}, "data")
