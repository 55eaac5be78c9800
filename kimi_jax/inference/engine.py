"""Requests in, events out: the scheduler's plans run on the device, the next one planned while the last one runs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.sharding import Mesh

from kimi_jax.config import ModelConfig
from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.dims import Params
from kimi_jax.errors import UserError, one_line
from kimi_jax.inference import step
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.plan import StepPlan
from kimi_jax.inference.request import Event, Request
from kimi_jax.inference.scheduler import Load, Scheduler


class Runner:
    """Weights, cache and the steps on them."""

    def __init__(
        self, params: Params, cfg: ModelConfig, limits: Limits, cache_dtype: str | None = None, mesh: Mesh | None = None
    ):
        devices = mesh.size if mesh else 1
        if limits.shards != devices:
            raise UserError(f"limits: {limits.shards} shards do not suit a mesh of {devices} devices")
        self._params, self._cfg, self._limits, self._cache_dtype, self._mesh = params, cfg, limits, cache_dtype, mesh
        self._one_at_a_time = devices > 1 and jax.default_backend() == "cpu"  # its collectives wait for threads
        self._state = self._empty()

    def reset(self) -> None:
        """An empty cache. The old one goes first, whoever holds it: the device has no room for two."""
        for array in jax.tree.leaves(self._state):
            array.delete()
        self._state = self._empty()

    def _empty(self) -> step.State:
        return step.init_state(self._cfg, self._limits, self._cache_dtype, self._mesh)

    def start(self, plan: StepPlan) -> step.Running:
        if self._one_at_a_time:
            jax.block_until_ready(self._state)
        running, self._state = step.run(self._params, self._cfg, self._state, plan, self._mesh)
        return running


class Engine:
    """One thread calls ``step`` (after ``wait``); any thread may submit, cancel and ask for the load.

    ``params`` as from ``model.in_compute_dtype``; on a mesh, with one shard for each device, as from
    ``weights``.
    ``cache_dtype``: of the latent cache, else ``cfg.dtype``. Without a tokenizer, events have no text. Requests without
    a seed get theirs from ``seed``. If the mesh spans several processes, this one plans and the others ``follow``:
    ``tell`` sends them every plan, or None if the device has lost what it held.
    """

    def __init__(
        self, params: Params, cfg: ModelConfig, limits: Limits, tokenizer: Tokenizer | None = None, seed: int = 0,
        cache_dtype: str | None = None, clock: Callable[[], float] = time.monotonic, mesh: Mesh | None = None,
        tell: Callable[[StepPlan | None], None] = lambda plan: None,
    ):  # fmt: skip
        if limits.max_len > cfg.max_position_embeddings or limits.vocab_size != cfg.vocab_size:
            raise UserError(
                f"limits: max_len {limits.max_len} and vocab_size {limits.vocab_size} do not suit a model of "
                f"{cfg.max_position_embeddings} positions and {cfg.vocab_size} tokens"
            )
        self._runner = Runner(params, cfg, limits, cache_dtype, mesh)
        self._clock, self._tell = clock, tell
        self._scheduler = Scheduler(limits, (lambda: Detokenizer(tokenizer)) if tokenizer else None, seed)
        self._in_flight: deque[step.Running] = deque()
        self._work = threading.Condition()  # guards the scheduler

    def submit(self, request: Request) -> int:
        """The request's number in events; ``UserError`` if it can never be served."""
        with self._work:
            id = self._scheduler.submit(request, self._clock())
            self._work.notify_all()
        return id

    def cancel(self, id: int) -> None:
        """Frees what the request holds at once; its last events come with the next ``step``."""
        with self._work:
            self._scheduler.cancel(id)
            self._work.notify_all()

    def load(self) -> Load:
        with self._work:
            return self._scheduler.load()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether there is something to do, waiting for it if need be."""
        with self._work:
            return self._work.wait_for(lambda: not self._scheduler.idle or self._scheduler.has_events, timeout_s)

    def step(self) -> list[Event]:
        """Starts one step and waits for the one before it. If the device fails, every request ends with an error."""
        try:
            with self._work:
                ahead = self._scheduler.runs_ahead
            if not ahead:
                self._commit(leave=0)
            with self._work:
                plan = self._scheduler.plan(self._clock())
            if plan is not None:
                self._tell(plan)
                self._in_flight.append(self._runner.start(plan))
            self._commit(leave=int(plan is not None))
        except Exception as error:
            self._in_flight.clear()
            self._tell(None)
            self._runner.reset()
            with self._work:
                self._scheduler.abort(one_line(error))
        with self._work:
            return self._scheduler.take_events()

    def generate(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events of ``requests``, numbered in their order, until all have ended. The engine has no other clients.

        Whoever stops listening has cancelled the rest.
        """
        numbers: dict[int, int] = {}
        try:
            for i, request in enumerate(requests):
                numbers[self.submit(request)] = i
            while self.wait(0):
                for event in self.step():
                    if event.request in numbers:  # else of an earlier call that was cut short
                        yield event._replace(request=numbers[event.request])
        finally:
            for id in numbers:
                self.cancel(id)  # nothing happens to what has ended

    def _commit(self, leave: int) -> None:
        """Waits for steps, while others may submit and cancel, until ``leave`` are in flight."""
        while len(self._in_flight) > leave:
            result = step.fetch(self._in_flight.popleft())
            with self._work:
                self._scheduler.commit(result)
