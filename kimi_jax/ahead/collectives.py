"""The collectives of a compiled program: kind, mesh axes, and the bytes that one device puts on the wire per run.

Of g devices, with the usual ring or direct algorithm (operand and result are those of one device):

    all-gather  result (g-1)/g      reduce-scatter  operand (g-1)/g      all-to-all  operand (g-1)/g
    all-reduce  2 operand (g-1)/g   collective-permute  operand          ragged-all-to-all  operand, an upper bound

Between slices, the transfer that the hosts make for an all-reduce counts as one, of g slices; any other, its operand.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kimi_jax.ahead.groups import groups, mesh_axes
from kimi_jax.ahead.hlo import Instruction
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.scopes import scope

KINDS = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
BETWEEN_SLICES = "between slices"  # the axis of a transfer by the data-centre network


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: tuple[str, ...]  # of the mesh, or BETWEEN_SLICES
    group: tuple[int, ...]  # one group of devices, by their place in the mesh; of a permutation, no group
    hops: tuple[tuple[int, int], ...]  # of a permutation: from where to where
    bytes: float  # on the wire, per device and step
    runs: float
    scope: str


def collectives(program: Program, mesh: Mapping[str, int], slices: int = 1) -> Iterator[Collective]:
    """Every collective that runs in a step on ``mesh`` (axis -> size)."""
    scattering = _scattering(program)
    for name, computation in program.computations.items():
        runs = program.runs[name]
        for i in computation.values() if runs else ():
            kind = i.op.removesuffix("-start")
            if kind == "all-reduce" and name in scattering:
                found = _collective("reduce-scatter", computation, i, runs, mesh)
                yield dataclasses.replace(found, scope=scattering[name])
            elif kind in KINDS:
                yield _collective(kind, computation, i, runs, mesh)
            elif i.op == "send" and "megascale_transfer_type" in i.attributes:
                yield _between_slices(computation[i.operands[0]].bytes, i, runs, slices)


def _scattering(program: Program) -> dict[str, str]:
    """Fusions that slice the result of their all-reduce, libtpu's way to say reduce-scatter, and their scopes."""
    fusions = [i for computation in program.computations.values() for i in computation.values() if i.op == "fusion"]
    return {
        name: scope(i.op_name)
        for i in fusions
        for name in i.names("calls")
        if "all-reduce-scatter" in name or "AllReduceScatterFusion" in i.attributes
    }


def _collective(
    kind: str, computation: Mapping[str, Instruction], i: Instruction, runs: float, mesh: Mapping[str, int]
) -> Collective:
    found = groups(i.attributes, math.prod(mesh.values()))
    sources = i.operands[:1] if kind == "ragged-all-to-all" else i.operands  # then come its output and the counts
    operand = sum(computation[o].bytes for o in sources if o in computation)
    paired = i.op.endswith("-start") and i.type.startswith("(") and kind != "all-reduce"
    result = i.bytes - operand if paired else i.bytes  # what starts an exchange names operand and result
    permutation = kind == "collective-permute"
    share = 1 - 1 / found.shape[1]
    sent = {
        "all-gather": result * share,
        "reduce-scatter": operand * share,
        "all-reduce": 2 * operand * share,
        "all-to-all": operand * share,
    }.get(kind, operand)
    return Collective(
        kind=kind,
        axes=mesh_axes(found, mesh),
        group=() if permutation else tuple(found[0].tolist()),
        hops=tuple(map(tuple, found.tolist())) if permutation else (),
        bytes=sent * runs,
        runs=runs,
        scope=scope(i.op_name),
    )


def _between_slices(operand: int, i: Instruction, runs: float, slices: int) -> Collective:
    reduces = 'transfer_type="ALL_REDUCE"' in i.attributes
    sent = 2 * operand * (slices - 1) / slices if reduces else operand
    kind = re.search(r'transfer_type="(\w+)"', i.attributes)
    name = f"dcn-{kind[1].lower().replace('_', '-')}" if kind else "dcn-send"
    return Collective(name, (BETWEEN_SLICES,), (), (), sent * runs, runs, scope(i.op_name))
