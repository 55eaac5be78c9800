"""Prompt lookup against a search from the end of the text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.inference.drafting import NGRAMS, Drafter


def search(tokens: list[int], most: int) -> list[int]:
    """What followed the latest earlier place of the longest n-gram at the end; past the end it repeats."""
    for n in NGRAMS:
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 8), st.integers(0, 60))
def test_drafts_follow_the_latest_match(tokens, most, cut):
    drafter = Drafter(tokens[:cut])
    drafter.extend(tokens[cut:])
    assert drafter.propose(most) == (search(tokens, most) if most else [])


def test_a_text_without_repetition_has_no_draft():
    assert Drafter(range(100)).propose(4) == []
