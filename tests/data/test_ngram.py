"""The order-2 byte model against counts in dictionaries, byte by byte."""

import math
import random
import tracemalloc
from collections import Counter, defaultdict

import pytest

from kimi_jax.data import ngram
from kimi_jax.data.ngram import First, order2_bits_per_byte
from kimi_jax.errors import UserError


def brute_force(train, held_out):
    seen = defaultdict(Counter)  # context -> following bytes, for contexts of two, one and no symbols

    def contexts(document):
        padded = ["start", "start", *document]
        for i, byte in enumerate(document):
            pair = tuple(padded[i : i + 2])
            yield byte, [(), pair[1:], pair]

    for document in train:
        for byte, keys in contexts(document):
            for key in keys:
                seen[key][byte] += 1

    def probability(byte, key, lower):
        n, t = sum(seen[key].values()), len(seen[key])
        return (seen[key][byte] + t * lower) / (n + t) if n else lower

    bits = []
    for document in held_out:
        for byte, keys in contexts(document):
            p = 1 / 256
            for key in keys:
                p = probability(byte, key, p)
            bits.append(-math.log2(p))
    return sum(bits) / len(bits)


def texts(seed, n, alphabet):
    rng = random.Random(seed)
    return [bytes(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(n)]


@pytest.mark.parametrize("alphabet", [b"ab", b"abcdefgh \n", bytes(range(256)), bytes([0, 255])])
def test_matches_the_dictionaries(alphabet):
    train, held_out = texts(0, 30, alphabet), texts(1, 10, alphabet + b"\0\xffz")
    assert order2_bits_per_byte(train, held_out) == pytest.approx(brute_force(train, held_out), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_cutting_documents_into_chunks_changes_nothing(monkeypatch, chunk):
    train, held_out = texts(0, 30, b"abc"), texts(1, 10, b"abcd")
    whole = order2_bits_per_byte(train, held_out)
    monkeypatch.setattr(ngram, "CHUNK", chunk)
    assert order2_bits_per_byte(train, held_out) == whole


def test_memory_does_not_grow_with_the_text(monkeypatch):
    def peak(*sizes):
        tracemalloc.start()
        order2_bits_per_byte((bytes(size) for size in sizes), [b"abc"])
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    monkeypatch.setattr(ngram, "CHUNK", 100_000)
    longest = 10_000_000
    assert peak(longest, *[1_000_000] * 20) < peak(1) + 2 * longest


def test_one_byte_documents_and_generators():
    assert order2_bits_per_byte(iter([b"a"]), iter([b"a", b"b", b""])) == pytest.approx(
        brute_force([b"a"], [b"a", b"b"])
    )


def test_without_training_text_every_byte_costs_eight_bits():
    assert order2_bits_per_byte([], [b"abc"]) == pytest.approx(8.0)
    assert order2_bits_per_byte([b""], [b"abc"]) == pytest.approx(8.0)


@pytest.mark.parametrize("held_out", [[], [b""]])
def test_nothing_to_measure(held_out):
    with pytest.raises(UserError, match="no held-out text"):
        order2_bits_per_byte([b"abc"], held_out)


@pytest.mark.parametrize(("most", "n", "cut"), [(1, 1, True), (3, 1, True), (4, 2, False), (9, 2, False)])
def test_the_first_documents(most, n, cut):
    documents = First([b"abc", b"de"], most)
    assert (len(list(documents)), documents.cut) == (n, cut)
