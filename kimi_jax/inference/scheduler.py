"""Which sequences the next step computes: continuous batching over the pages of the latent cache.

Sequences are ranked once and for all by (arrival - priority * age_s): a higher priority goes first, yet nothing that
comes more than age_s per step of priority later goes before what waits. The first in rank are served and the queue is
never jumped. Rows and pages, when they run out in a shard (``shards.py``), are taken from the last in rank there, whose
tokens are then computed again from the prompt on. The first in rank always goes on, since any accepted request fits
into a shard alone.

A step is either prefill (chunks of prompts) or decode (one token per row, and drafts); the two take turns, so that
between two tokens of a sequence lies at most one prefill step. A chunk of one token is decode.

``plan`` and ``commit`` alternate, with at most two steps in flight: the step that is planned while another one runs
takes that one's tokens on the device (``StepPlan.feed_B``). What depends on unknown tokens
(``Sequence.needs_tokens``) waits for the next plan. The same calls give the same plans.
"""

from __future__ import annotations

import math
import random
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.plan import Row, StepPlan, StepResult, pack
from kimi_jax.inference.request import Event, Request
from kimi_jax.inference.rows import decode_rows, prefill_rows, prefill_width
from kimi_jax.inference.sequence import Sequence, by_rank
from kimi_jax.inference.shards import Shard, best

NOT_FINITE = "the model gave NaN or infinity: its weights or their dtype do not suit this text"


class Load(NamedTuple):
    running: int
    waiting: int
    pages_used: int
    pages_total: int
    preemptions: int  # since the start


class Scheduler:
    """``detokenizer`` makes what turns tokens into text, one for each continuation; without it there is no text.

    Times are seconds of any clock that does not go back.
    """

    def __init__(self, limits: Limits, detokenizer: Callable[[], Detokenizer] | None = None, seed: int = 0):
        self.limits = limits
        self.preemptions = 0
        self._shards = [Shard(i, limits) for i in range(limits.shards)]
        self._detokenizer = detokenizer
        self._seeds = random.Random(seed)
        self._waiting: list[Sequence] = []  # both by rank
        self._running: list[Sequence] = []
        self._unfinished: dict[int, list[Sequence]] = {}  # of each request
        self._in_flight: deque[list[Row]] = deque()
        self._events: list[Event] = []
        self._n_requests = 0
        self._decoded_last = False

    def submit(self, request: Request, now: float) -> int:
        """The request's number in events. ``UserError`` if it can never be served."""
        self.limits.check(request)
        if request.stop and self._detokenizer is None:
            raise UserError("stop: there is no tokenizer to make text, give stop_ids instead")
        seed = self._seeds.getrandbits(64) if request.sampling.seed is None else request.sampling.seed
        id = self._n_requests
        made = [Sequence(id, i, request, seed, now, self.limits, self._detokenizer) for i in range(request.n)]
        self._n_requests += 1
        self._unfinished[id] = list(made)
        made[0].followers = made[1:]
        insort(self._waiting, made[0], key=by_rank)
        return id

    def cancel(self, id: int) -> None:
        """Frees what the request holds at once. Nothing happens if it has ended."""
        for sequence in list(self._unfinished.get(id, ())):
            self._finish(sequence, sequence.event("cancelled"))

    def abort(self, message: str) -> None:
        """Ends every request with an error and forgets all pages: the device has lost what it held."""
        for id in list(self._unfinished):
            for sequence in list(self._unfinished[id]):
                self._finish(sequence, sequence.event("error", message=message))
        self._in_flight.clear()
        self._shards = [Shard(i, self.limits) for i in range(self.limits.shards)]

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def idle(self) -> bool:
        """Whether neither requests nor steps are left."""
        return not self._unfinished and not self._in_flight

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    @property
    def runs_ahead(self) -> bool:
        """Whether every running sequence can be planned while its last token is not known."""
        return not any(sequence.needs_tokens for sequence in self._running)

    @property
    def _free_rows(self) -> int:
        return self.limits.max_rows - len(self._running)

    def load(self) -> Load:
        started = len(self._running)
        waiting = sum(map(len, self._unfinished.values())) - started
        pools = [shard.pool for shard in self._shards]
        used, total = sum(pool.in_use for pool in pools), sum(pool.n_pages for pool in pools)
        return Load(started, waiting, used, total, self.preemptions)

    def plan(self, now: float) -> StepPlan | None:
        """The next step, to be run after those in flight; None if there is nothing to run before a ``commit``."""
        assert len(self._in_flight) < 2
        self._admit()
        self._refuse_late(now)
        able = [s for s in self._running if not s.done_when_known and not (s.pending and s.needs_tokens)]
        prefill, decode = [s for s in able if s.unplanned > 1], [s for s in able if s.unplanned == 1]
        rows = [] if prefill and self._decoded_last else decode_rows(self._with_room(decode), self._shards, self.limits)
        self._decoded_last = bool(rows)
        if rows:
            J = T = 1 + (self.limits.draft if any(row.drafted for row in rows) else 0)
        else:
            prefill = [sequence for sequence in prefill if sequence.running]
            if not prefill:
                return None
            J, T = 1, prefill_width(prefill, self.limits)
            rows = prefill_rows(prefill, T, self.limits)
        for i, row in enumerate(rows):
            sequence = row.sequence
            sequence.planned += len(row.tokens)
            sequence.steps += 1
            sequence.pending += row.samples
            sequence.row = i
        self._in_flight.append(rows)
        return pack(rows, self.limits, T, J)

    def commit(self, result: StepResult) -> None:
        """Takes over the results of the oldest step in flight."""
        rows = self._in_flight.popleft()
        for i, row in enumerate(rows):
            sequence = row.sequence
            sequence.steps -= 1
            sequence.pending -= row.samples
            if sequence.finished:
                continue
            if row.scores:
                sequence.score(row.start, result.next_logprobs(i, sequence.request.sampling.prompt_logprobs or 0))
            event, count = None, 1
            if row.samples:
                count = int(result.count_B[i])
                event = self._sampled(sequence, result, i, count)
                for follower in sequence.followers:
                    follower.started, follower.cached_tokens = True, sequence.cached_tokens
                    insort(self._waiting, follower, key=by_rank)
                sequence.followers = []
            if sequence.running:
                rejected = row.drafted + 1 - count if row.samples else 0
                sequence.planned -= rejected
                self._shards[sequence.shard].publish(sequence, row.start + len(row.tokens) - rejected)
            if event and event.finish:
                self._finish(sequence, event)
            elif event:
                self._events.append(event)

    def _sampled(self, sequence: Sequence, result: StepResult, i: int, count: int) -> Event:
        """What the first ``count`` tokens of row ``i`` mean for the client; the prompt's scores go before."""
        if not all(map(math.isfinite, result.logprob_BJ[i, :count].tolist())):
            return sequence.event("error", message=NOT_FINITE)
        if not sequence.scored:
            sequence.scored = True
            self._events.append(sequence.event(prompt_logprobs=sequence.prompt_logprobs()))
        asked = sequence.request.sampling.logprobs
        tokens = result.tokens_BJ[i, :count].tolist()
        return sequence.append(tokens, [] if asked is None else result.logprobs(i, asked))

    def _refuse_late(self, now: float) -> None:
        late = [] if math.isinf(self.limits.max_wait_s) else list(self._waiting)
        for sequence in late:
            if not sequence.started and now - sequence.arrived > self.limits.max_wait_s:
                message = f"the request waited longer than {self.limits.max_wait_s:g} s for its start; try again later"
                for one in list(self._unfinished[sequence.id]):
                    self._finish(one, one.event("error", message=message))

    def _admit(self) -> None:
        """Starts waiting sequences in order of rank, until one has to wait."""
        while self._waiting and not self._waiting[0].steps and self._start(self._waiting[0]):
            pass

    def _start(self, sequence: Sequence) -> bool:
        """Whether the best shard for ``sequence`` has room, after preempting those behind it if need be."""
        shard = best(self._shards, sequence, self._free_rows)
        if shard is None:
            return False
        pages = shard.share(sequence)
        wanted = shard.wanted(sequence, len(pages))
        if not self._outranks(sequence, shard, wanted, n_rows=1):
            shard.pool.release(pages)
            return False
        self._waiting.remove(sequence)
        shard.start(sequence, pages)
        insort(self._running, sequence, key=by_rank)
        return True

    def _outranks(self, sequence: Sequence, shard: Shard, n_pages: int, n_rows: int = 0) -> bool:
        """Whether so much is free in the shard, after preempting those there that rank behind if need be."""
        while shard.pool.available < n_pages or min(self._free_rows, shard.free_rows) < n_rows:
            if not shard.running or shard.running[-1].rank <= sequence.rank:
                return False
            self._preempt(shard.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        insort(self._waiting, sequence, key=by_rank)
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._shards[sequence.shard].stop(sequence)

    def _finish(self, sequence: Sequence, event: Event) -> None:
        sequence.finished = True
        if sequence.running:
            self._stop(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._unfinished[sequence.id].remove(sequence)
        if not self._unfinished[sequence.id]:
            del self._unfinished[sequence.id]
        self._events.append(event)

    def _with_room(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that have a page for their next token; the others are preempted."""
        for sequence in sequences:
            if sequence.running:
                shard = self._shards[sequence.shard]
                missing = shard.missing(sequence, sequence.planned + 1)
                if self._outranks(sequence, shard, missing):
                    shard.grow(sequence, sequence.planned + 1)
                else:
                    self._preempt(sequence)
        return [sequence for sequence in sequences if sequence.running]
