"""What stands in the arrays of a step."""

from __future__ import annotations

import dataclasses

import numpy as np

from kimi_jax.inference.limits import Limits
from kimi_jax.inference.plan import Row, StepPlan, pack
from kimi_jax.inference.request import Request, Sampling
from kimi_jax.inference.sequence import Sequence

LIMITS = Limits(n_pages=99, page_size=4, max_len=300, vocab_size=70, max_rows=4, step_tokens=64)
NEUTRAL = {
    "seed_B": 0, "temperature_B": 0, "top_k_B": 0, "top_p_B": 1, "min_p_B": 0, "repetition_B": 1, "presence_B": 0,
    "frequency_B": 0, "feed_B": -1, "drafted_B": 0,
}  # fmt: skip


class Even:
    def mask(self) -> np.ndarray:
        return np.array([0x55555555, 0x55555555, 0x15], np.int32)

    def accept(self, token: int) -> None: ...


def sequence(pages: list[int], **what) -> Sequence:
    made = Sequence(0, 0, Request(prompt=tuple(range(20)), **what), seed=9, arrived=0, limits=LIMITS, detokenizer=None)
    made.pages = pages
    return made


def test_rows_are_padded_with_what_means_nothing():
    rows = [
        Row(sequence([7, 8, 9]), 4, [4, 5, 6]),
        Row(sequence([3]), 0, [0], feed=1),
        Row(sequence([5, 6]), 3, [3, 4]),
    ]
    plan = pack(rows, LIMITS, T=4, J=1)
    assert plan.tokens_BT.tolist() == [[4, 5, 6, 0], [0] * 4, [3, 4, 0, 0], [0] * 4]
    assert (plan.start_B.tolist(), plan.length_B.tolist()) == ([4, 0, 3, 0], [3, 1, 2, 0])
    assert (
        plan.pages_BP[:, :3].tolist() == [[7, 8, 0], [3, 0, 0], [5, 6, 0], [0, 0, 0]] and not plan.pages_BP[:, 3:].any()
    )
    assert plan.feed_B.tolist() == [-1, 1, -1, -1]
    assert {name: getattr(plan, name)[3] for name in NEUTRAL} == NEUTRAL
    assert all(
        getattr(plan, name) is None
        for name in StepPlan._fields
        if name.endswith(("BU", "BJw", "Sb")) or name == "next_BT"
    )
    dtypes = {name: array.dtype.name for name, array in plan._asdict().items() if isinstance(array, np.ndarray)}
    real = {"temperature_B", "top_p_B", "min_p_B", "repetition_B", "presence_B", "frequency_B"}
    for name, dtype in dtypes.items():
        assert dtype == ("float32" if name in real else "uint32" if name == "seed_B" else "int32")


def test_rows_are_listed_by_shard():
    made = [sequence([1]) for _ in range(5)]
    for one, shard in zip(made, (2, 0, 2, 2, 0), strict=True):
        one.shard = shard
    limits = dataclasses.replace(LIMITS, shards=3, max_rows=12)
    plan = pack([Row(one, 0, [0]) for one in made], limits, T=1, J=1)
    assert plan.rows_Sb is not None and plan.rows_Sb.dtype == np.int32 and plan.tokens_BT.shape == (8, 1)
    assert plan.rows_Sb.tolist() == [[1, 4, 8, 8], [8, 8, 8, 8], [0, 2, 3, 8]]


def test_only_rows_that_sample_have_parameters():
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, presence_penalty=0.5, logit_bias={3: 2.0}, logprobs=2)
    made = sequence([1, 2, 3, 4, 5], sampling=sampling, grammar=Even)
    made.append([4, 4, 6], [])
    inside, last = (pack([Row(made, 0, [0] * 9, samples=samples)], LIMITS, T=16, J=1) for samples in (False, True))
    assert {name: getattr(inside, name)[0] for name in NEUTRAL} == NEUTRAL
    assert inside.seen_BU is None and inside.bias_BU is None and inside.grammar_BJw is None
    assert (last.temperature_B[0], last.top_k_B[0], last.presence_B[0], last.n_logprobs) == (0.5, 3, 0.5, 20)
    assert last.seen_BU is not None and last.times_BU is not None
    assert last.biased_BU is not None and last.bias_BU is not None and last.grammar_BJw is not None
    assert last.seen_BU[0].tolist() == [4, 6] + [70] * 62 and last.times_BU[0, :3].tolist() == [2, 1, 0]
    assert last.biased_BU[0, :2].tolist() == [3, 70] and last.bias_BU[0, :2].tolist() == [2, 0]
    assert last.grammar_BJw.tolist() == [[[0x55555555, 0x55555555, 0x15]]]


def test_a_row_without_a_grammar_may_sample_anything():
    rows = [Row(sequence([1], grammar=Even), 0, [0]), Row(sequence([2]), 0, [0, 1, 2], drafted=2)]
    plan = pack(rows, LIMITS, T=3, J=3)
    assert plan.grammar_BJw is not None and plan.grammar_BJw.shape == (2, 3, 3)
    assert (plan.grammar_BJw[0, 0] == [0x55555555, 0x55555555, 0x15]).all() and (plan.grammar_BJw[1] == 2**32 - 1).all()
    assert plan.seen_BU is not None and (plan.seen_BU == 70).all() and not plan.bias_BU.any()


def test_prefill_has_fewer_sizes_than_decode():
    for n, decoded, prefilled in ((1, 1, 1), (2, 2, 4), (4, 4, 4), (5, 8, 8), (8, 8, 8)):
        limits, made = dataclasses.replace(LIMITS, max_rows=8, step_tokens=128), [sequence([1, 2, 3, 4])] * n
        assert pack([Row(one, 0, [0]) for one in made], limits, T=1, J=1).tokens_BT.shape == (decoded, 1)
        assert pack([Row(one, 0, [0] * 9) for one in made], limits, T=16, J=1).tokens_BT.shape == (prefilled, 16)


def test_a_temperature_too_small_for_f32_is_greedy():
    plan = pack([Row(sequence([1], sampling=Sampling(temperature=1e-9)), 0, [0])], LIMITS, T=1, J=1)
    assert plan.temperature_B.tolist() == [0]


def test_what_follows_in_the_prompt_is_scored():
    made = sequence([1, 2, 3, 4, 5], sampling=Sampling(prompt_logprobs=0))
    plan = pack([Row(made, 16, [16, 17, 18, 19], scores=True), Row(sequence([9]), 0, [0, 1])], LIMITS, T=16, J=1)
    assert (
        plan.next_BT is not None and plan.next_BT[0].tolist() == [17, 18, 19] + [0] * 13 and not plan.next_BT[1].any()
    )
