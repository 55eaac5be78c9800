"""Which sequences the next step computes: continuous batching over the pages of the latent cache.

Sequences are ranked once and for all by (arrival - priority * age_s): a higher priority goes first, yet nothing that
comes more than age_s per step of priority later goes before what waits. The first in rank are served and the queue is
never jumped. Rows and pages, when they run out, are taken from the last in rank, whose tokens are then computed again
from the prompt on. The first in rank always goes on, since any accepted request fits into the cache alone.

A step is either prefill (chunks of prompts) or decode (one token per row, and drafts); the two take turns, so that
between two tokens of a sequence lies at most one prefill step. A chunk of one token is decode.

``plan`` and ``commit`` alternate, with at most two steps in flight: the step that is planned while another one runs
takes that one's tokens on the device (``StepPlan.feed_B``). What depends on unknown tokens
(``Sequence.needs_tokens``) waits for the next plan. The same calls give the same plans.
"""

from __future__ import annotations

import random
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kimi_jax.errors import UserError
from kimi_jax.inference.limits import Limits, padded
from kimi_jax.inference.pages import PagePool
from kimi_jax.inference.plan import Row, StepPlan, StepResult, pack
from kimi_jax.inference.prefix import chain
from kimi_jax.inference.request import Event, Request
from kimi_jax.inference.sequence import Detokenizer, Sequence


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
        self._pool = PagePool(limits.n_pages)
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
        self._check(request)
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
        self._pool = PagePool(self.limits.n_pages)

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

    def load(self) -> Load:
        started = len(self._running)
        waiting = sum(map(len, self._unfinished.values())) - started
        return Load(started, waiting, self._pool.in_use, self._pool.n_pages, self.preemptions)

    def plan(self, now: float) -> StepPlan | None:
        """The next step, to be run after those in flight; None if there is nothing to run before a ``commit``."""
        assert len(self._in_flight) < 2
        self._refuse_late(now)
        self._admit()
        able = [s for s in self._running if not s.done_when_known and not (s.pending and s.needs_tokens)]
        prefill, decode = [s for s in able if s.unplanned > 1], [s for s in able if s.unplanned == 1]
        rows = [] if prefill and self._decoded_last else self._decode_rows(decode)
        self._decoded_last = bool(rows)
        if rows:
            J = T = 1 + (self.limits.draft if any(row.drafted for row in rows) else 0)
        else:
            prefill = [sequence for sequence in prefill if sequence.running]
            if not prefill:
                return None
            J, T = 1, self._chunk(prefill)
            rows = self._prefill_rows(prefill, T)
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
                self._score(i, row, result)
            event, count = None, 1
            if row.samples:
                if not sequence.scored:
                    sequence.scored = True
                    self._events.append(sequence.event(prompt_logprobs=sequence.prompt_logprobs()))
                count = int(result.count_B[i])
                tokens = result.tokens_BJ[i, :count].tolist()
                asked = sequence.request.sampling.logprobs
                event = sequence.append(tokens, [] if asked is None else result.logprobs(i, asked))
                for follower in sequence.followers:
                    follower.started, follower.cached_tokens = True, sequence.cached_tokens
                    insort(self._waiting, follower, key=by_rank)
                sequence.followers = []
            if sequence.running:
                rejected = row.drafted + 1 - count if row.samples else 0
                sequence.planned -= rejected
                self._publish(sequence, row.start + len(row.tokens) - rejected)
            if event and event.finish:
                self._finish(sequence, event)
            elif event:
                self._events.append(event)

    def _check(self, request: Request) -> None:
        limits, size = self.limits, len(request.prompt)
        ids = {"prompt": request.prompt, "stop_ids": request.stop_ids, "logit_bias": request.sampling.logit_bias}
        for name, tokens in ids.items():
            if tokens and max(tokens) >= limits.vocab_size:
                raise UserError(f"{name}: token ids must be less than {limits.vocab_size}, not {max(tokens)}")
        if request.stop and self._detokenizer is None:
            raise UserError("stop: there is no tokenizer to make text, give stop_ids instead")
        wanted = 1 if request.max_tokens is None else request.max_tokens
        if size + wanted > limits.max_len:
            raise UserError(f"prompt of {size} tokens and max_tokens {wanted} are more than max_len, {limits.max_len}")
        if size + max(wanted, 1) - 1 > limits.capacity:  # the last token is not computed
            raise UserError(
                f"prompt of {size} tokens and max_tokens {wanted}: the cache holds {limits.capacity} in all"
            )

    def _refuse_late(self, now: float) -> None:
        for sequence in list(self._waiting):
            if not sequence.started and now - sequence.arrived > self.limits.max_wait_s:
                message = f"the request waited longer than {self.limits.max_wait_s:g} s for its start; try again later"
                for one in list(self._unfinished[sequence.id]):
                    self._finish(one, one.event("error", message=message))

    def _admit(self) -> None:
        """Starts waiting sequences in order of rank, until one has to wait."""
        while self._waiting:
            sequence = self._waiting[0]
            if sequence.steps or not self._outranks(sequence, lambda: len(self._running) < self.limits.max_rows):
                return
            size, page_size = len(sequence.tokens), self.limits.page_size
            known = (size - 1) // page_size if sequence.scored else 0  # one token at least is computed, to sample
            pages = self._pool.share(chain(sequence.keys, sequence.tokens, page_size, known)[:known])
            missing = self.limits.pages_for(size) - len(pages)
            before = sum(s.rank < sequence.rank for s in self._running)  # may each need a page more soon
            if not self._outranks(sequence, lambda need=missing + before: self._pool.available >= need):
                self._pool.release(pages)
                return
            sequence.pages = pages + self._pool.take(missing)
            sequence.published = len(pages)
            sequence.planned = len(pages) * page_size
            if not sequence.started:
                sequence.cached_tokens = sequence.planned
            sequence.started = sequence.running = True
            insort(self._running, self._waiting.pop(0), key=by_rank)

    def _outranks(self, sequence: Sequence, enough: Callable[[], bool]) -> bool:
        """Whether there is enough, after preempting those that rank behind ``sequence`` if need be."""
        while not enough():
            if not self._running or self._running[-1].rank <= sequence.rank:
                return False
            self._preempt(self._running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._let_go(sequence)
        insort(self._waiting, sequence, key=by_rank)
        self.preemptions += 1

    def _let_go(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.planned = sequence.published = 0
        sequence.running = False

    def _finish(self, sequence: Sequence, event: Event) -> None:
        sequence.finished = True
        if sequence.running:
            self._running.remove(sequence)
            self._let_go(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._unfinished[sequence.id].remove(sequence)
        if not self._unfinished[sequence.id]:
            del self._unfinished[sequence.id]
        self._events.append(event)

    def _decode_rows(self, sequences: list[Sequence]) -> list[Row]:
        for sequence in sequences:
            if sequence.running and not self._grow(sequence, sequence.planned + 1):
                self._preempt(sequence)
        sequences = [sequence for sequence in sequences if sequence.running]
        rows = []
        width = 1 + self.limits.draft
        drafting = sequences and padded(len(sequences), self.limits.rows) * width <= self.limits.step_tokens
        for sequence in sequences:
            start, held = sequence.planned, len(sequence.pages) + self._pool.available
            room = held * self.limits.page_size - start - 1
            draft = sequence.draft(min(self.limits.draft, room)) if drafting else []
            self._grow(sequence, start + 1 + len(draft))
            if sequence.pending:
                rows.append(Row(sequence, start, [0], feed=sequence.row))
            else:
                rows.append(Row(sequence, start, [sequence.tokens[-1], *draft], drafted=len(draft)))
        return rows

    def _grow(self, sequence: Sequence, n_tokens: int) -> bool:
        missing = max(0, self.limits.pages_for(n_tokens) - len(sequence.pages))
        if not self._outranks(sequence, lambda: self._pool.available >= missing):
            return False
        sequence.pages += self._pool.take(missing)
        return True

    def _chunk(self, sequences: list[Sequence]) -> int:
        """The width at which the first in rank, as many as a step holds, get the most tokens done."""
        return max(self.limits.chunks, key=lambda T: sum(min(T, s.unplanned) for s in sequences[: self._rows_of(T)]))

    def _rows_of(self, T: int) -> int:
        return max(size for size in self.limits.rows if size * T <= self.limits.step_tokens)

    def _prefill_rows(self, sequences: list[Sequence], T: int) -> list[Row]:
        rows = []
        for sequence in sequences[: self._rows_of(T)]:
            stop = min(sequence.planned + T, len(sequence.tokens))
            tokens, samples = sequence.tokens[sequence.planned : stop], stop == len(sequence.tokens)
            rows.append(Row(sequence, sequence.planned, tokens, samples=samples, scores=not sequence.scored))
        return rows

    def _publish(self, sequence: Sequence, computed: int) -> None:
        """Lets others share the pages that are now full."""
        n = min(computed, len(sequence.tokens)) // self.limits.page_size
        keys = chain(sequence.keys, sequence.tokens, self.limits.page_size, n)
        for i in range(sequence.published, n):
            self._pool.publish(sequence.pages[i], keys[i])
        sequence.published = max(sequence.published, n)

    def _score(self, i: int, row: Row, result: StepResult) -> None:
        sequence = row.sequence
        found = result.next_logprobs(i, sequence.request.sampling.prompt_logprobs or 0)
        sequence.scores.update(zip(range(row.start + 1, row.start + 1 + len(row.tokens)), found, strict=False))


def by_rank(sequence: Sequence) -> tuple[float, int, int]:
    return sequence.rank
