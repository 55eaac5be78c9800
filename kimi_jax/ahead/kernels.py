"""Mosaic kernels in a compiled program: their names, what their authors declare, and what of that they execute."""

from __future__ import annotations

import re

from kimi_jax.ahead.hlo import Computation, Instruction


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


def executed_share(computation: Computation, i: Instruction) -> float:
    """Of the declared FLOPs. Splash attention declares all pairs of queries and keys, and skips blocks that are masked
    throughout: its first vector lists those that it visits."""
    name = kernel_name(i)
    if not name.startswith("splash"):
        return 1.0
    suffix = "_dkv" if "dkv" in name else "_dq" if "dq" in name else ""
    settings = dict(re.findall(r'"(block_\w+)": (\d+)', i.attributes.replace("\\", "")))
    block = [int(settings.get(f"block_{side}{suffix}", 0)) for side in ("q", "kv")]
    dims = [computation[o].shapes[0].dims for o in i.operands if o in computation]
    visited = next((d[0] for d in dims if len(d) == 1), 0)
    queries, keys, *_ = [d[-2] for d in dims if len(d) >= 3] + [0, 0]
    known = visited * block[0] * block[1] * queries * keys
    return min(1.0, visited * block[0] * block[1] / (queries * keys)) if known else 1.0
