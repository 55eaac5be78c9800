"""What one instruction costs a device: FLOPs of its products, and bytes that it reads and writes in HBM.

A product counts 2 per multiply-add of real elements: holes and padding of a convolution, into which the TPU compiler
turns products, are left out. A kernel counts what its author declared. Bytes count an operand once, a slice of it where
only a slice is read, and an update in place as the update; arrays that the compiler keeps on the chip count nothing.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np

from kimi_jax.ahead.hlo import Computation, Instruction, Shape
from kimi_jax.ahead.kernels import declared
from kimi_jax.ahead.program import Program

FREE = {  # move nothing through HBM themselves; what they call is counted where it stands
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("async-start", "async-update", "call-start", "call-update", "send", "recv"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "domain"),
}
HOST = 5  # the memory space
SLICING = {"dynamic-slice", "slice", "gather"}  # read of their first operand what they return
UPDATING = {"dynamic-update-slice": 1, "scatter": 2}  # write their first operand in place: which operand goes there


def flops(program: Program, computation: Computation, i: Instruction) -> float:
    """Of one run, with everything that is fused into it."""
    if i.op == "dot":
        contracted = i.integers("lhs_contracting_dims")
        lhs = _dims(computation, i.operands[0])
        return 2.0 * math.prod(i.shapes[0].dims) * math.prod(lhs[d] for d in contracted)
    if i.op == "convolution":
        return _convolution(_dims(computation, i.operands[0]), _dims(computation, i.operands[1]), i)
    if i.op == "custom-call":
        return declared(i, "flops")
    if i.op == "fusion":
        inside = [program.computations[name] for name in i.names("calls")]
        return sum(flops(program, c, j) for c in inside for j in c.values())
    return 0.0


def _dims(computation: Computation, name: str) -> tuple[int, ...]:
    return computation[name].shapes[0].dims


def _convolution(lhs: tuple[int, ...], rhs: tuple[int, ...], i: Instruction) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes
    of_lhs, of_rhs, of_out = labels.groups()
    out = i.shapes[0].dims
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", i.attributes) or ["", ""])[1]))
    pairs = 1
    for d in range(sum(label.isdigit() for label in of_lhs)):
        at = str(d)
        low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        spacing = [
            int(window[key].split("x")[d]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        ]
        pairs *= _pairs(lhs[of_lhs.index(at)], rhs[of_rhs.index(at)], out[of_out.index(at)], low, *spacing)
    groups = {key: int(n) for key, n in re.findall(r"(feature|batch)_group_count=(\d+)", i.attributes)}
    batch, features = out[of_out.index("b")], out[of_out.index("f")]
    per_output = lhs[of_lhs.index("f")] // groups.get("feature", 1)
    whole = 2.0 * batch * features * per_output * pairs
    return whole / groups.get("batch", 1) if batch == lhs[of_lhs.index("b")] else whole


@lru_cache(maxsize=4096)
def _pairs(size: int, taps: int, outputs: int, low: int, stride: int, dilated: int, spread: int) -> int:
    """Pairs of an output and a tap of the window that meet a real element of an axis."""
    if taps == 1 and (low, stride, dilated) == (0, 1, 1):
        return outputs
    last = (size - 1) * dilated
    few, step, many, jump = (taps, spread, outputs, stride) if taps < outputs else (outputs, stride, taps, spread)
    line = np.arange(many, dtype=np.int64) * jump - low
    at = (line + k * step for k in range(few))
    return sum(int(np.count_nonzero((x >= 0) & (x <= last) & (x % dilated == 0))) for x in at)


def hbm_bytes(program: Program, computation: Computation, i: Instruction) -> float:
    """Read and written by one run of an instruction that is not inside a fusion."""
    if i.op in FREE or i.op.endswith("-done") or '"AllocateBuffer"' in i.attributes:
        return 0.0
    if i.op == "custom-call":
        return declared(i, "bytes_accessed") or _all(computation, i)
    if i.op == "fusion":
        return _fused(program, computation, i)
    if i.op in SLICING:
        return 2 * _held(i.shapes)
    if i.op in UPDATING:
        return 2 * _held(computation[i.operands[UPDATING[i.op]]].shapes)
    if i.op.endswith("-start"):  # its result names the operands again
        return _held(i.shapes)
    return _all(computation, i)


def hbm_written(program: Program, computation: Computation, i: Instruction) -> float:
    """Of ``hbm_bytes``, those that are written."""
    if not hbm_bytes(program, computation, i):
        return 0.0
    if i.op == "fusion":
        return _written(program.computations[i.names("calls")[0]], i)
    if i.op in UPDATING:
        return _held(computation[i.operands[UPDATING[i.op]]].shapes)
    return _held(i.shapes)


def host_bytes(i: Instruction) -> float:
    """Between the device and the host's memory, by a copy or the update or look-up of a slice there."""
    if not i.op.endswith("-start") or not any(shape.space == HOST for shape in i.shapes):
        return 0.0
    return float(sum(shape.bytes for shape in i.shapes if not shape.space and shape.dims))


def _held(found: list[Shape]) -> float:
    return float(sum(shape.bytes for shape in found if not shape.space))


def _all(computation: Computation, i: Instruction) -> float:
    return _held(i.shapes) + sum(_held(computation[o].shapes) for o in i.operands if o in computation)


def _fused(program: Program, computation: Computation, i: Instruction) -> float:
    inside, total = program.computations[i.names("calls")[0]], 0.0
    for j in inside.values():
        if j.op == "parameter":
            operand = computation[i.operands[int(j.arguments)]]
            if not any(shape.space for shape in operand.shapes):
                total += min(float(operand.bytes), _read(program, inside, j.name))
    return total + _written(inside, i)


def _written(inside: Computation, i: Instruction) -> float:
    root = next(j for j in inside.values() if j.root)
    written = [inside[o] for o in root.operands] if root.op == "tuple" else [root]
    total = 0.0
    for shape, j in zip(i.shapes, written, strict=False):
        if not shape.space:
            updates = UPDATING.get(j.op)
            total += shape.bytes if updates is None else inside[j.operands[updates]].bytes
    return total


def _read(program: Program, inside: Computation, name: str) -> float:
    """What the users inside a fusion, and inside the fusions in it, read of an operand; infinite: all of it."""
    return sum(_read_by(program, inside, name, user) for user in inside.values() if name in user.operands)


def _read_by(program: Program, inside: Computation, name: str, user: Instruction) -> float:
    if user.op in SLICING and user.operands[0] == name:
        return float(user.bytes)
    if user.op in UPDATING and user.operands[0] == name:
        return 0.0
    if user.op == "bitcast" or "output_to_operand_aliasing" in user.attributes:  # the same memory, seen otherwise
        return _read(program, inside, user.name)
    if user.op == "fusion":
        called = program.computations[user.names("calls")[0]]
        parameters = {int(j.arguments): j.name for j in called.values() if j.op == "parameter"}
        own = [parameters[k] for k, operand in enumerate(user.operands) if operand == name]
        return sum(_read(program, called, parameter) for parameter in own)
    return math.inf
