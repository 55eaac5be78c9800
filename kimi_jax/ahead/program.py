"""How often each computation of a compiled program runs.

A loop's body stands in the text once; here it counts as often as the loop goes round, which XLA's own cost analysis
leaves out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from kimi_jax.ahead.hlo import Computation, Instruction, parse


@dataclass
class Program:
    """``trips``: of loops whose length the data decide, by the scope in their names."""

    computations: dict[str, Computation]
    entry: str
    trips: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str, trips: Mapping[str, int] | None = None) -> Program:
        return cls(*parse(text), trips or {})

    @cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs; of a conditional, the branch that costs the most cycles."""
        callers: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for name, computation in self.computations.items():
            for instruction in computation.values():
                for callee, each in self._calls(name, instruction):
                    callers[callee].append((name, each))
        found: dict[str, float] = {self.entry: 1.0}

        def times(name: str) -> float:
            if name not in found:
                found[name] = sum(times(caller) * n for caller, n in callers[name])
            return found[name]

        return {name: times(name) for name in self.computations}

    @cached_property
    def unknown_trips(self) -> list[Instruction]:
        """Loops whose length the data decide, and nobody else told; they count as one trip."""
        loops = [(name, i) for name, c in self.computations.items() for i in c.values() if i.op == "while"]
        return [i for name, i in loops if self.trip_count(name, i) is None]

    @cached_property
    def fused(self) -> set[str]:
        """Computations inside a fusion: what they compute stays on the chip."""
        called = [i.names("calls") for c in self.computations.values() for i in c.values() if i.op == "fusion"]
        return {name for names in called for name in names}

    def root(self, name: str) -> Instruction:
        return next(i for i in self.computations[name].values() if i.root)

    def _calls(self, where: str, i: Instruction) -> list[tuple[str, float]]:
        if i.op == "while":
            trips = self.trip_count(where, i)
            return [(name, 1.0 if trips is None else trips) for name in i.names("condition") + i.names("body")]
        if i.op == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [name for key in keys for name in i.names(key)]
            return [(max(branches, key=self._cycles), 1.0)] if branches else []
        if i.op in ("fusion", "call", "async-start", "call-start"):
            return [(name, 1.0) for name in i.names("calls") or i.names("to_apply")]
        return []

    def trip_count(self, where: str, loop: Instruction) -> int | None:
        """As XLA noted it, or from ``counter < bound`` in the condition; None if the bound is computed."""
        noted = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if noted:
            return int(noted[1])
        condition, initial = loop.names("condition")[0], self._initial(where, loop)
        compare, of = self.root(condition), list(self.root(condition).operands)
        if compare.op == "fusion":  # the comparison inside, of the fusion's own operands
            name = compare.names("calls")[0]
            outer, compare = of, self.root(name)
            inside = self.computations[name]
            of = [outer[int(inside[o].arguments)] if inside[o].op == "parameter" else o for o in compare.operands]
            scope = {**inside, **self.computations[condition]}
        else:
            scope = self.computations[condition]
        direction = re.search(r"direction=(\w+)", compare.attributes)
        values = [_constant(scope, o, initial) for o in of]
        if compare.op != "compare" or not direction or len(values) != 2 or None in values:
            return next((n for scope, n in self.trips.items() if f"/{scope}/" in loop.op_name), None)
        low, high = values if direction[1] == "LT" else reversed(values)
        return max(0, int(high or 0) - int(low or 0)) if direction[1] in ("LT", "GT") else None

    def _initial(self, where: str, loop: Instruction) -> list[int | None]:
        """The constants among what a loop starts from."""
        scope = self.computations[where]
        start = scope.get(loop.operands[0]) if loop.operands else None
        return [_constant(scope, o, []) for o in start.operands] if start and start.op == "tuple" else []

    def _cycles(self, name: str) -> float:
        """Of one run of a computation, for the comparison of branches."""
        total = 0.0
        for i in self.computations[name].values():
            total += i.cycles
            if i.op != "fusion":
                total += sum(self._cycles(callee) * times for callee, times in self._calls(name, i))
        return total


def _constant(scope: Computation, name: str, carried: list[int | None]) -> int | None:
    """An integer that a scalar has when the loop starts: a constant, or an element of what is carried."""
    i = scope.get(name)
    while i is not None and i.op in ("copy", "convert", "bitcast", "reshape") and i.operands:
        i = scope.get(i.operands[0])
    if i is None:
        return None
    if i.op == "get-tuple-element":
        index = re.search(r"index=(\d+)", i.attributes)
        return carried[int(index[1])] if index and int(index[1]) < len(carried) else None
    return int(i.arguments) if i.op == "constant" and re.fullmatch(r"-?\d+", i.arguments.strip()) else None
