"""What a run on several processes waits for, and what it traces."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kimi_jax.errors import UserError


@dataclass(frozen=True)
class PodsConfig:
    """Limits in seconds, and steps to trace with xprof into ``<workdir>/traces``.

    ``start_seconds``: for all processes to come together, and for their first collective.
    ``heartbeat_seconds``: a process that is silent for so long counts as dead, and the others end. One that dies on a
    machine that lives is noticed at once.
    ``hang_seconds``: a step that takes longer is reported, with the stacks of all threads, and ends the run; 0 means
    20 times the longest step so far, at least 600, and 1800 for the first.
    ``trace_from``: the first step to trace; 0 traces only when SIGUSR1 asks for it.
    ``trace_steps``: how many steps a trace covers.
    """

    start_seconds: float = 600
    heartbeat_seconds: float = 100
    hang_seconds: float = 0
    trace_from: int = 0
    trace_steps: int = 3

    def __post_init__(self):
        at_least = {"hang_seconds": 0, "trace_from": 0}
        for name, value in dataclasses.asdict(self).items():
            if value < at_least.get(name, 1):
                raise UserError(f"pods.{name} must be at least {at_least.get(name, 1)}, not {value}")
