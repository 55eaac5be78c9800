"""The text of a compiled program: its computations, and their instructions with types and attributes.

``jax.jit(f).lower(...).compile().as_text()`` is the program of one device, after partitioning and scheduling.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
HEAD = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
START = re.compile(r"\s+(?:ROOT\s+)?%?[\w.\-]+ = ")
TYPED = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.DOTALL)
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
UNKNOWN_CYCLES = 10**15  # the compiler writes 2^63 - 1 where it has no estimate


@dataclass(frozen=True)
class Shape:
    """One array of a type: ``space`` is its memory, 0 for HBM (1: VMEM, 5: the host; others hold flags)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    dynamic: bool = False  # a dimension is only bounded: its size is known when the program runs

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    """Of one element; the digits that follow the kind of the number say it: f32, s4, f8e4m3fn."""
    found = re.match(r"[a-z]+?(\d+)", dtype)
    return BITS.get(dtype, int(found[1]) if found else 0)


def shapes(text: str) -> list[Shape]:
    """Every array of a type; a tuple has several."""
    found = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.replace("<=", "").split(",") if d)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0, "<=" in dims))
    return found


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    arguments: str  # between the parentheses
    attributes: str  # after them
    root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", self.arguments)))

    @cached_property
    def shapes(self) -> list[Shape]:
        return shapes(self.type)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The path of jax transformations and scopes that it stems from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's own estimate; 0 without one."""
        found = CYCLES.search(self.attributes)
        cycles = int(found[1]) if found else 0
        return cycles if cycles < UNKNOWN_CYCLES else 0

    def names(self, key: str) -> list[str]:
        """The computations that an attribute such as ``calls=%f`` or ``branch_computations={%f, %g}`` names."""
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")] if found else []

    def integers(self, key: str) -> list[int]:
        """The numbers of an attribute such as ``dimensions={0,1}``."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry.

    An instruction may span lines, as large constants and kernels' metadata do.
    """
    computations: dict[str, Computation] = {}
    entry, name, pending = "", "", []

    def finish() -> None:
        found = _instruction("\n".join(pending)) if pending else None
        if found:
            computations[name][found.name] = found
        pending.clear()

    for line in text.splitlines():
        head = HEAD.match(line) if not name and line[:1].strip() else None
        if head:
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
        elif name and (line.rstrip() == "}" or line.startswith("}, execution_thread")):
            finish()
            name = ""
        elif name:
            if START.match(line):
                finish()
            pending.append(line)
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not what compiled.as_text() returns")
    return computations, entry


def _instruction(text: str) -> Instruction | None:
    found = TYPED.match(text)
    if not found:
        return None
    close = _closing(text, found.end() - 1)
    return Instruction(found[2], found[3], found[4], text[found.end() : close], text[close + 1 :], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes; quoted text is passed over."""
    depth = 0
    for token in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if not depth:
            return token.start()
    return len(text)
