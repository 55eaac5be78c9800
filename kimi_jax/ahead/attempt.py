"""A program compiled for devices that are not there, and how much memory it takes or would have taken."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kimi_jax.ahead.hardware import CHIPS, GIB, of_kind

OUT_OF_MEMORY = re.compile(r"([\d.]+)([MGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([MGT])")  # libtpu's two ways
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


class Attempt(NamedTuple):
    """Memory in GiB of one device, and on its host."""

    text: str | None  # of the compiled program; None if it does not fit
    peak: float
    hbm: float
    on_host: float
    lower_seconds: float
    compile_seconds: float


def attempt(lower: Callable[[], Any], kind: str) -> Attempt:
    """Compiles what ``lower`` returns, a ``jax.stages.Lowered`` for devices of a kind."""
    began = time.perf_counter()
    lowered = lower()
    lowered_at = time.perf_counter()
    text, hbm, on_host = None, of_kind(CHIPS, kind).hbm_gib, 0.0
    try:
        program = lowered.compile()
        memory = program.memory_analysis()
        peak, on_host = memory.peak_memory_in_bytes / GIB, memory.host_temp_size_in_bytes / GIB
        text = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        peak, hbm = _out_of_memory(error)
    return Attempt(text, peak, hbm, on_host, lowered_at - began, time.perf_counter() - lowered_at)


def _out_of_memory(error: Exception) -> tuple[float, float]:
    """GiB that a program needs and that there are, as the compiler's refusal says; raises it if it is another one."""
    found = OUT_OF_MEMORY.search(str(error))
    if not found:
        raise error
    return float(found[1]) * UNITS[found[2]] / GIB, float(found[3]) * UNITS[found[4]] / GIB
