"""A run's processes from their first word to their last: join, preflight, watch, leave together."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from kimi_jax.errors import UserError, one_line
from kimi_jax.pods import preflight
from kimi_jax.pods.cluster import Cluster, Told, find
from kimi_jax.pods.config import PodsConfig
from kimi_jax.pods.peers import FAREWELL, Peers, leave
from kimi_jax.pods.roll_call import roll_call
from kimi_jax.pods.watchdog import StepLimit, Watchdog


class Session:
    """What a run tells about itself, on one process or several. ``host``: of process 0, as all others reach it.
    ``mark``: the same on all processes of this start, known to nobody else."""

    def __init__(
        self, prog: str, cfg: PodsConfig, peers: Peers | None = None, processes: int = 1, host: str = "", mark: str = ""
    ):
        self._prog, self._cfg, self._peers = prog, cfg, peers
        self.process, self.processes, self.host, self.mark = peers.process if peers else 0, processes, host, mark
        self._watchdog = Watchdog(self._hang)
        self._limit: StepLimit | None = None

    def at(self, where: str) -> None:
        """Says where this process is, to those who wait for it."""
        if self._peers:
            self._peers.at(where)

    def meet(self, where: str) -> None:
        """Waits for all processes, as before a first step: its collectives wait for less time than compilers take."""
        self.at(where)
        if self._peers:
            preflight.check_collective(jax.devices())

    def step(self, step: int) -> None:
        """A step begins; the one before has ended."""
        self._limit = self._limit or StepLimit(self._cfg.hang_seconds)
        self._expect(f"step {step}", self._limit.next())

    def rest(self) -> None:
        """The steps are over; what follows may take its time."""
        self._watchdog.rest()
        self.at("the end")

    def close(self) -> None:
        self._watchdog.close()

    def _expect(self, what: str, seconds: float) -> None:
        self.at(what)
        self._watchdog.expect(what, seconds)

    def _hang(self, line: str) -> None:
        if self._peers:
            self._peers.hang(line)
        leave(f"{self._prog}: {line}", stacks=True)

    def preflight(self, workdir: Path | None) -> None:
        """Raises ``UserError``, or ends all processes when the time is over."""
        assert self._peers
        seconds = self._cfg.start_seconds
        self._expect("the start of the devices", seconds)
        devices = jax.devices()
        preflight.check_devices(devices, self._peers.name)
        self._expect("the first collective", seconds)
        preflight.check_collective(devices)
        if workdir:
            self._expect("the check of the workdir", seconds)
            name = self._peers.name(self._peers.process)
            preflight.check_workdir(workdir, self.mark, lambda: preflight.check_collective(devices), name)
        self._watchdog.rest()
        self.at("the set-up")


@contextmanager
def joined(
    prog: str, told: Told, cfg: PodsConfig, config: Mapping[str, Any], workdir: Path | None = None
) -> Iterator[Session]:
    """Starts ``jax.distributed`` if the run has several processes, and ends it.

    Before: a roll call and a preflight, which name the process that is missing or different. During: when one process
    dies, fails or hangs, all end with a line that names it. Costs nothing to a run of one process.
    """
    cluster = find(told, cfg.start_seconds)
    if cluster is None:
        session = Session(prog, cfg)
        yield session
        session.close()
        return
    present = roll_call(cluster, preflight.facts(config, workdir), cfg.start_seconds)
    peers = Peers(prog, cluster.process, present, cfg.heartbeat_seconds)
    peers.start()
    host = cluster.coordinator.rpartition(":")[0].strip("[]")
    session = Session(prog, cfg, peers, cluster.processes, host, present.mark)
    try:
        _start_jax(cluster, cfg)
        session.preflight(workdir)
        yield session
    except BaseException as error:
        _fail(peers, error)
    session.close()
    peers.done()
    jax.distributed.shutdown()
    peers.close()


def _start_jax(cluster: Cluster, cfg: PodsConfig) -> None:
    """JAX has heartbeats of its own; they are given longer, since JAX aborts without a clear line."""
    jax.config.update("jax_enable_preemption_service", False)  # we agree on the last step ourselves: ``total``
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        cluster.local_device_ids,
        initialization_timeout=int(cfg.start_seconds) + 60,
        heartbeat_timeout_seconds=int(2 * cfg.heartbeat_seconds) + 10,
    )


def _fail(peers: Peers, error: BaseException) -> None:
    """Ends all processes. A fault may be the echo of another's death: that is named first."""
    if "--verbose" in sys.argv:
        traceback.print_exception(error)
    if not isinstance(error, (UserError, KeyboardInterrupt)):
        time.sleep(FAREWELL)
    peers.fail("interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error))
