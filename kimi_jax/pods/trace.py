"""xprof traces of some steps, for TensorBoard or xprof: by range, or when a signal asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from kimi_jax.pods.config import PodsConfig
from kimi_jax.pods.signals import Signals


class Tracer:
    """Traces ``trace_steps`` steps from ``trace_from`` on, and after every SIGUSR1, into ``folder``."""

    def __init__(self, cfg: PodsConfig, folder: Path, signals: Signals):
        self._cfg, self._folder, self._signals = cfg, folder, signals
        self._left = 0  # steps still to trace

    def before(self, step: int) -> None:
        """To be called before the step is started."""
        if self._left or not (step == self._cfg.trace_from or self._signals.trace):
            return
        self._signals.trace = False
        self._left = self._cfg.trace_steps
        jax.profiler.start_trace(self._folder)

    def after(self, step: Any) -> str | None:
        """To be called with what a step returned; says where the trace is when it is complete."""
        if not self._left:
            return None
        jax.block_until_ready(step)
        self._left -= 1
        return None if self._left else self._finish()

    def close(self) -> None:
        if self._left:
            self._finish()

    def _finish(self) -> str:
        self._left = 0
        jax.profiler.stop_trace()
        return f"trace: {self._folder}"
