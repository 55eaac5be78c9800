"""Where sequences run if there are several shards."""

from __future__ import annotations

import dataclasses

from kimi_jax.inference.scheduler import Scheduler
from tests.inference.workload import LIMITS, Job, assert_right, request, serve


def test_shards_fill_evenly_and_a_known_prefix_goes_first():
    """Rows count before pages, and a prefix before both: the last two find theirs where the second request was."""
    limits = dataclasses.replace(LIMITS, shards=3, n_pages=20)
    even = [Job(0, request([i % 5, i // 5] * 4, 20)) for i in range(6)]
    run = serve(limits, even)
    assert [run.homes[i, 0] for i in range(6)] == [[0], [1], [2], [0], [1], [2]]
    assert all(plan.rows_Sb.shape == (3, 2) for plan in run.plans if plan.length_B.sum() == 6)
    long_and_short = [Job(0, request([0] * size, 20)) for size in (40, 4, 5, 6)]
    run = serve(dataclasses.replace(LIMITS, shards=2, n_pages=40), long_and_short)
    assert [run.homes[i, 0] for i in range(4)] == [[0], [1], [1], [0]]
    jobs = [Job(0, request([i] * 9, 2)) for i in range(3)] + [Job(20 + i, request([1] * 8 + [i], 4)) for i in range(2)]
    run = serve(limits, jobs)
    assert_right(run, jobs, limits)
    assert [run.homes[i, 0] for i in range(5)] == [[0], [1], [2], [1], [1]]
    assert [event.cached_tokens for event in run.events if event.finish][3:] == [8, 8]


def test_only_those_in_the_same_shard_give_way():
    """Two shards of 28 tokens. The first and the third share one and outgrow it: the third goes to the other shard."""
    limits = dataclasses.replace(LIMITS, shards=2, n_pages=8, max_rows=4)
    jobs = [Job(0, request([0] * 8, 17)), Job(0, request([1] * 8, 5)), Job(0, request([2] * 8, 17))]
    run = serve(limits, jobs)
    assert_right(run, jobs, limits)
    assert run.scheduler.preemptions == 1
    assert [run.homes[i, 0] for i in range(3)] == [[0], [1], [0, 1]]


def test_a_priority_takes_the_row_of_the_last_in_rank_of_all_shards():
    limits = dataclasses.replace(LIMITS, shards=2, max_rows=2, n_pages=20)
    jobs = [Job(0, request([i] * 9, 20)) for i in range(2)] + [Job(4, request([4] * 9, 3, priority=1))]
    run = serve(limits, jobs)
    assert_right(run, jobs, limits)
    assert [event.request for event in run.events if event.finish] == [2, 0, 1]
    assert run.scheduler.preemptions == 1 and run.homes[2, 0] == [1]


def test_the_load_is_that_of_all_shards():
    scheduler = Scheduler(dataclasses.replace(LIMITS, shards=3, n_pages=11))
    for i in range(4):
        scheduler.submit(request([i] * 8, 2), 0)
    scheduler.plan(0)
    assert scheduler.load() == (4, 0, 8, 30, 0)
