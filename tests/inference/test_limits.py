"""Sizes that steps are padded to, and limits that make no sense."""

from __future__ import annotations

import pytest

from kimi_jax.errors import UserError
from kimi_jax.inference.limits import Limits, padded, sizes

GOOD = {"n_pages": 9, "page_size": 4, "max_len": 100, "vocab_size": 5, "max_rows": 6, "step_tokens": 40}


def test_sizes_end_with_the_most():
    assert sizes(1, 6) == (1, 2, 4, 6) and sizes(1, 8) == (1, 2, 4, 8) and sizes(16, 3) == (3,)
    assert sizes(8, 2048, 8) == (8, 64, 512, 2048)
    assert [padded(n, (1, 2, 4, 6)) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_a_sequence_may_be_one_token_longer_than_the_cache():
    limits = Limits(**GOOD)
    assert (limits.capacity, limits.most_tokens, limits.page_tables) == (32, 33, (8,))
    assert Limits(**{**GOOD, "max_len": 20}).most_tokens == 20


def test_rows_are_split_evenly_and_a_request_gets_one_shard():
    limits = Limits(**GOOD, shards=4)
    assert (limits.rows_per_shard, limits.shard_rows) == (2, (1, 2))
    assert (limits.capacity, limits.most_tokens) == (32, 33)
    assert Limits(**GOOD, shards=9).rows_per_shard == 1


@pytest.mark.parametrize(
    "name, value",
    [("n_pages", 1), ("page_size", 0), ("max_rows", 0), ("step_tokens", 5), ("draft", -1), ("draft", 40), ("shards", 0),
     ("max_wait_s", -1.0), ("age_s", float("nan")), ("age_s", float("inf"))],
)  # fmt: skip
def test_a_limit_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} must be"):
        Limits(**{**GOOD, name: value})
