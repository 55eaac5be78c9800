"""Packing against a brute-force twin that walks the stream token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.data.packing import Batch, n_sequences, pack

EOS, PAD = 1, 9


def stream_of(lengths):
    """Distinct tokens from 10 up, an EOS after every document."""
    documents, token = [], 10
    for length in lengths:
        documents.append([*range(token, token + length), EOS])
        token += length
    offsets = np.cumsum([0] + [len(d) for d in documents])
    return np.array([t for d in documents for t in d], np.uint16), offsets, documents


def twin(documents, i, seq_len):
    """One sequence of the pairs (token, next token) of the stream, with the document of each token."""
    flat = [(token, number) for number, document in enumerate(documents) for token in document]
    rows, last, segment, position = [], None, 0, 0
    for (token, number), (target, target_number) in list(zip(flat, flat[1:], strict=False))[i * seq_len :][:seq_len]:
        if number != last:
            last, segment, position = number, segment + 1, 0
        rows.append((token, target, segment, position, float(number == target_number)))
        position += 1
    rows += [(PAD, PAD, 0, 0, 0.0)] * (seq_len - len(rows))
    return Batch(*map(list, zip(*rows, strict=True)))


lengths_st = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(lengths_st, st.integers(1, 17))
def test_every_sequence_matches_the_twin(lengths, seq_len):
    stream, offsets, documents = stream_of(lengths)
    for i in range(n_sequences(len(stream), seq_len) + 2):
        got, want = pack(stream, offsets, i, seq_len, PAD), twin(documents, i, seq_len)
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{name} of sequence {i}")
        assert [x.dtype for x in got] == [np.int32] * 4 + [np.float32]


@settings(max_examples=100, deadline=None)
@given(lengths_st, st.integers(1, 17))
def test_an_epoch_holds_every_pair_once(lengths, seq_len):
    stream, offsets, documents = stream_of(lengths)
    rows = [pack(stream, offsets, i, seq_len, PAD) for i in range(n_sequences(len(stream), seq_len))]
    real = [(t, y) for row in rows for t, y, s in zip(row.tokens, row.targets, row.segment_ids, strict=True) if s]
    assert real == list(zip(stream, stream[1:], strict=False))
    assert all(row.segment_ids[0] == 1 for row in rows)
    learnt = [y for row in rows for y, w in zip(row.targets, row.weights, strict=True) if w]
    assert learnt == [token for document in documents for token in document[1:]]


def test_an_example_by_hand():
    stream, offsets, _ = stream_of([2, 0, 4])  # 10 11 E | E | 12 13 14 15 E
    assert n_sequences(len(stream), 5) == 2
    first, last = (pack(stream, offsets, i, 5, PAD) for i in range(2))
    assert first.tokens.tolist() == [10, 11, EOS, EOS, 12]
    assert first.targets.tolist() == [11, EOS, EOS, 12, 13]
    assert first.segment_ids.tolist() == [1, 1, 1, 2, 3]
    assert first.positions.tolist() == [0, 1, 2, 0, 0]
    assert first.weights.tolist() == [1, 1, 0, 0, 1]
    assert last.tokens.tolist() == [13, 14, 15, PAD, PAD]
    assert last.targets.tolist() == [14, 15, EOS, PAD, PAD]
    assert last.segment_ids.tolist() == [1, 1, 1, 0, 0]
    assert last.positions.tolist() == [0, 1, 2, 0, 0]
    assert last.weights.tolist() == [1, 1, 1, 0, 0]


def test_token_ids_above_16_bits():
    stream = np.array([163_000, 163_585], np.uint32)
    assert pack(stream, np.array([0, 2]), 0, 2).targets.tolist() == [163_585, 0]
