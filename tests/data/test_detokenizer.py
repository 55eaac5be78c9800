"""Text step by step, against decoding everything at once."""

import random

import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.data.detokenizer import Detokenizer

BYTES = tk.load("bytes")
SECTION = "<|tool_calls_section_begin|>"


def steps(ids, keep=()):
    detokenizer = Detokenizer(BYTES, keep)
    return [*(detokenizer.feed(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", ["", "abc", "é你😀\u0301", "a\ufffdb", "🏳️‍🌈 and more"])
def test_a_character_comes_with_its_last_byte(text):
    pieces = steps(BYTES.encode(text))
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_broken_bytes_are_replaced_as_when_all_is_decoded_at_once():
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.choice([65, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0xFF, 0x80, 0xED]) for _ in range(12)]
        assert "".join(steps(ids)) == bytes(ids).decode("utf-8", errors="replace")


def test_control_tokens_give_no_text_unless_kept():
    section, end = BYTES.special_ids[SECTION], BYTES.special_ids["<|im_end|>"]
    ids = [*BYTES.encode("aé"), section, *BYTES.encode("b"), end, BYTES.pad, BYTES.vocab_size - 2]
    assert "".join(steps(ids)) == "aéb"
    assert "".join(steps(ids, keep=[SECTION])) == f"aé{SECTION}b"


def test_a_control_token_ends_an_incomplete_character():
    half = BYTES.encode("é")[:1]
    assert steps([*half, BYTES.eos, *BYTES.encode("x")]) == ["", "\ufffd", "x", ""]
    assert steps(half) == ["", "\ufffd"]
