"""A run's copies between two checkpoints: written by a thread while it trains, and found again when it starts.

Every host keeps the pieces of the state that its devices hold, and its neighbour's, where no other has them: one host,
or several that are no neighbours, may be lost for good. Nothing is agreed on while training, but that all have
written the last copy before the next begins; so the newest or the one before is complete on all hosts at any moment.
"""

from __future__ import annotations

import sys
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from kimi_jax.checkpoint.emergency import LocalCopies
from kimi_jax.checkpoint.emergency_exchange import Exchange, History, choose, read_history
from kimi_jax.checkpoint.pieces import assembled, by_process, on_host
from kimi_jax.errors import one_line
from kimi_jax.pods.session import Session
from kimi_jax.pods.total import Total
from kimi_jax.training.step import TrainState


class EmergencyCopies:
    """The local copies of the run in ``workdir``, from the start of its processes to their end."""

    def __init__(self, folder: Path, workdir: Path, session: Session, total: Total):
        self._workdir, self._session, self._total = workdir, session, total
        self._start = session.mark or uuid.uuid4().hex
        self._history = read_history(workdir) or History(self._start, self._start, None)
        self._process = jax.process_index()
        self._copies = LocalCopies(folder, self._history.run, self._start, self._process)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emergency copies")
        self._writing: Future[None] | None = None
        self._said_why = False

    def resume(self, checkpoint: int, steps: int, like: TrainState) -> tuple[tuple[int, TrainState] | None, str]:
        """Step and state of the newest complete copy between the steps ``checkpoint`` and ``steps``, or None and a line
        that says why a newer copy does not do. ``like``: the state as shapes with shardings.
        """
        self._session.at("the local copies")
        known = [s for s in self._copies.saves() if self._history.holds(s) and checkpoint < s.step < steps]
        here = {save: self._copies.read(save) for save in known}
        exchange = Exchange(self._workdir, self._start, self._process, jax.process_count(), self._meet)
        lists = exchange.lists({save: set(pieces) for save, pieces in here.items()})
        need = by_process(like)
        save, why = choose(lists, need)
        found = None
        if save:
            have = [having.get(save, set()) for having in lists]
            state = assembled(like, exchange.completed(here.get(save, {}), have, need))
            found = save.step, jax.block_until_ready(state)
        exchange.close(History(self._history.run, self._start, save))
        self._copies.keep_only([save] if save else [])
        return found, why

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host's memory, and starts to write it. All processes have to call it together."""
        self._wait()
        self._meet()
        newest = self._copies.newest()
        self._copies.keep_only([newest] if newest else [])
        self._writing = self._thread.submit(self._write, step, on_host(state))

    def clear(self) -> None:
        """Removes the copies: the checkpoint of the last step is complete."""
        self._wait()
        self._meet()
        self._copies.remove()

    def close(self) -> None:
        self._thread.shutdown()

    def _write(self, step: int, pieces: dict[str, np.ndarray]) -> None:
        """An error costs the copy, not the run: it is said once, and the next copy is tried all the same."""
        try:
            self._copies.write(step, pieces)
        except Exception as error:
            if not self._said_why:
                where = f"process {self._process}: no local copy of step {step}"
                print(f"{where}: {one_line(error)}; training goes on, later copies are tried", file=sys.stderr)
            self._said_why = True

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()
        self._writing = None

    def _meet(self) -> None:
        np.asarray(self._total(0.0))
