"""What the peak of a compiled step's memory is made of, and whether it can depend on the routing of tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from kimi_jax.ahead.hlo import Computation, Instruction
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.scopes import scope


def held(tree: Any) -> int:
    """Bytes per device of arrays that know where they lie."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def saved(program: Program) -> int:
    """Bytes that the loops of the forward pass write slice by slice: what they keep for the backward pass."""
    loops = [
        (name, i)
        for name, computation in program.computations.items()
        for i in computation.values()
        if i.op == "while" and scope(i.op_name) == "forward"
    ]
    bodies = {body for _, i in loops for body in i.names("body")}
    outermost = [i for name, i in loops if name not in bodies]
    return sum(_stacked(program, body) for i in outermost for body in i.names("body"))


def _stacked(program: Program, body: str) -> int:
    computation, root = program.computations[body], program.root(body)
    if root.op != "tuple":
        return 0
    updated = [i for o in root.operands if (i := _origin(program, computation, o)).op == "dynamic-update-slice"]
    return sum(i.bytes for i in updated)


def _origin(program: Program, computation: Computation, name: str) -> Instruction:
    """What computes a value: through copies, and into the fusion that it leaves."""
    i, element = computation[name], 0
    while i.op in ("copy", "bitcast", "get-tuple-element", "copy-done", "copy-start") and i.operands[0] in computation:
        index = re.search(r"index=(\d+)", i.attributes)
        element = int(index[1]) if i.op == "get-tuple-element" and index else element
        i = computation[i.operands[0]]
    if i.op != "fusion":
        return i
    called = i.names("calls")[0]
    root = program.root(called)
    inside = program.computations[called]
    return _origin(program, inside, root.operands[element] if root.op == "tuple" else root.name)


@dataclass(frozen=True)
class Routing:
    """Why the peak is the same for every routing: nothing but the length of ``loops`` depends on it.

    An array of dynamic size would be one whose bytes the data decide; the compiler plans the rest once, for all data.
    """

    dynamic_arrays: int
    loops: tuple[str, ...]  # whose length the data decide: the rounds of the exchange
    worst_over_balanced: float | None  # peak memory: 1, or unknown if there are dynamic arrays


def routing(program: Program) -> Routing:
    dynamic = sum(
        shape.dynamic
        for computation in program.computations.values()
        for i in computation.values()
        for shape in i.shapes
    )
    loops = tuple(sorted(scope(i.op_name) for i in program.unknown_trips))
    return Routing(dynamic, loops, None if dynamic else 1.0)
