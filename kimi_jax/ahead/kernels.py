"""Mosaic kernels in a compiled program: their names, and what their authors declare."""

from __future__ import annotations

import re

from kimi_jax.ahead.hlo import Instruction


def kernel_name(i: Instruction) -> str:
    """Of a Mosaic kernel; empty for the compiler's own custom calls, which compute nothing."""
    if i.op != "custom-call" or 'custom_call_target="tpu_custom_call"' not in i.attributes:
        return ""
    named = re.search(r"\bkernel_name\W+([\w.\-]+)", i.attributes)
    return named[1] if named else re.sub(r"((\.(clone|remat|cloned))|(\.\d+))*$", "", i.name)


def declared(i: Instruction, figure: str) -> float:
    """``flops`` or ``bytes_accessed`` of a kernel's cost estimate; 0 without one."""
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', i.attributes)
    found = re.search(rf'"{figure}":"?(\d+)', estimate[1]) if estimate else None
    return float(found[1]) if found else 0.0
