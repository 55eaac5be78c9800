"""Which part of a training step an instruction belongs to, from the jax transformations in its name."""

from __future__ import annotations

SCOPES = ("forward", "recomputed", "backward", "update", "unlabelled")


def scope(op_name: str) -> str:
    """The part of a step that an instruction belongs to; the optimizer and all bookkeeping are ``update``."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "update" if "/" in op_name else "unlabelled"
