"""The plan of a conversion: the arrays to write, and the units that the work is cut into.

A unit is one chunk of one array. A chunk of weights never spans two layers or two experts, so that a host reads its
own experts alone; it holds whole rows of one Hugging Face matrix, as they lie in the source, and large matrices are cut
into several. The scales of fp8 weights take 4,096 times less: one chunk holds those of a layer, all experts together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import fp8
from kimi_jax.checkpoint.arrays import ArraySpec
from kimi_jax.checkpoint.hf_names import Entry, plan
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError

CHUNK_BYTES = 32 << 20  # of the target, at most, where a single row is not larger
BUFFERS_BYTES = 8 << 20  # of a worker: the strips of f32 between reading and writing
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "fp8": fp8.E4M3}
PARAMS, SCALES = "params.", "scales."


class Kinds(Protocol):
    """What a plan asks of a source: the model, and the dtypes of its tensors."""

    @property
    def cfg(self) -> ModelConfig: ...

    @property
    def block(self) -> tuple[int, int]: ...

    def dtype(self, entry: Entry) -> np.dtype: ...

    def scale_dtype(self, entry: Entry) -> np.dtype: ...


@dataclass(frozen=True)
class Unit:
    """One chunk: where it lies in its array, and the rows of which tensors it holds."""

    number: int
    array: str
    cell: tuple[int, ...]
    entries: tuple[Entry, ...]  # one weight; or the weights of a layer whose scales these are
    start: int  # rows of the weight
    stop: int  # 0: of scales
    nbytes: int  # in the target
    source_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What a worker holds at most: source and target, and TensorStore's copy of a chunk that is padded."""
        return self.source_bytes + 2 * self.nbytes + BUFFERS_BYTES


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion writes. It depends on the config, the dtypes of the tensors and ``dtype`` alone."""

    dtype: str  # a key of DTYPES
    arrays: Mapping[str, ArraySpec]
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    def share(self, i: int, n: int) -> list[Unit]:
        """The units of share ``i`` of 0..n-1."""
        return list(self.units[i::n])


def make_plan(source: Kinds, dtype: str) -> Plan:
    """Raises ``UserError`` if the source cannot be kept in ``dtype``."""
    by_array: dict[str, list[Entry]] = {}
    for entry in plan(source.cfg):
        by_array.setdefault(".".join(entry.path), []).append(entry)
    arrays: dict[str, ArraySpec] = {}
    units: list[Unit] = []
    for name, entries in by_array.items():
        kept = _target_dtype(source, entries, dtype)
        spec = arrays[PARAMS + name] = _weight_spec(entries, kept)
        units += _weight_units(source, PARAMS + name, spec, entries, len(units))
        if kept == fp8.E4M3:
            spec = arrays[SCALES + name] = _scale_spec(source, entries)
            units += _scale_units(SCALES + name, spec, entries, len(units))
    if dtype == "fp8" and not any(spec.dtype == fp8.E4M3 for spec in arrays.values()):
        raise UserError("the source holds no fp8 tensors to keep: convert it with --dtype bf16 or float32")
    return Plan(dtype, arrays, tuple(units))


def _target_dtype(source: Kinds, entries: list[Entry], dtype: str) -> np.dtype:
    if entries[0].path[-1] == "bias":  # the router's: a buffer that stays in f32
        return np.dtype(np.float32)
    if dtype != "fp8":
        return DTYPES[dtype]
    found = {source.dtype(entry) for entry in entries}
    if fp8.E4M3 in found and len(found) > 1:
        odd = next(entry for entry in entries if source.dtype(entry) != source.dtype(entries[0]))
        raise UserError(
            f"{odd.name} is {source.dtype(odd)}, {entries[0].name} is {source.dtype(entries[0])}: "
            "one array cannot keep both; convert with --dtype bf16 or float32"
        )
    return found.pop() if found <= {fp8.E4M3, DTYPES["bf16"]} and len(found) == 1 else np.dtype(np.float32)


def _stack(entries: list[Entry]) -> tuple[int, ...]:
    """How many layers, or layers and experts, the array stacks."""
    return tuple(n + 1 for n in entries[-1].index)


def _weight_spec(entries: list[Entry], dtype: np.dtype) -> ArraySpec:
    entry, stack = entries[0], _stack(entries)
    rank, ours = len(stack), entry.ours
    axes = (*range(entry.inputs, len(ours)), *range(entry.inputs))  # as Hugging Face has them: outputs first
    row_bytes = math.prod(ours) // ours[axes[0]] * dtype.itemsize
    chunk = list(ours)
    chunk[axes[0]] = _rows_per_chunk(ours[axes[0]], max(1, CHUNK_BYTES // row_bytes))
    order = (*range(rank), *(rank + axis for axis in axes))
    return ArraySpec((*stack, *ours), dtype, (*[1] * rank, *chunk), order)


def _rows_per_chunk(rows: int, most: int) -> int:
    """At most ``most``, preferably such that every chunk has as many and whole fp8 blocks, with few chunks."""
    fewest = -(-rows // most)
    for n in range(fewest, min(2 * fewest, rows) + 1):
        if rows % n == 0 and (n == 1 or rows // n % fp8.BLOCK[0] == 0):
            return rows // n
    return -(-rows // fewest)


def _weight_units(source: Kinds, name: str, spec: ArraySpec, entries: list[Entry], first: int) -> Iterator[Unit]:
    number = first
    for entry in entries:
        rank = len(entry.index)
        axis = spec.order[rank]
        size, step = spec.shape[axis], spec.chunk[axis]
        per_row = entry.shape[0] // size  # Hugging Face rows for one step along that axis
        width = math.prod(entry.shape[1:])
        for cell, start in enumerate(range(0, size, step)):
            stop = min(start + step, size)
            grid = tuple(cell if i == axis else entry.index[i] if i < rank else 0 for i in range(len(spec.shape)))
            rows = (start * per_row, stop * per_row)
            n = (rows[1] - rows[0]) * width
            nbytes, read = n * spec.dtype.itemsize, n * source.dtype(entry).itemsize
            yield Unit(number, name, grid, (entry,), *rows, nbytes, read)
            number += 1


def _scale_spec(source: Kinds, entries: list[Entry]) -> ArraySpec:
    found = {source.scale_dtype(entry) for entry in entries}
    if len(found) > 1:
        raise UserError(f"the scales of {entries[0].name} and its like have several dtypes: {sorted(map(str, found))}")
    rows, columns = entries[0].shape
    stack, blocks = _stack(entries), fp8.grid((rows, columns), source.block)
    rank, shape = len(stack), (*stack, *blocks[::-1])
    return ArraySpec(shape, found.pop(), (*[1] * min(rank, 1), *shape[min(rank, 1) :]), (*range(rank), rank + 1, rank))


def _scale_units(name: str, spec: ArraySpec, entries: list[Entry], first: int) -> Iterator[Unit]:
    if len(spec.shape) == 2:  # of an array that is not stacked
        yield Unit(first, name, (0, 0), tuple(entries), 0, 0, spec.nbytes, spec.nbytes)
        return
    per_layer = len(entries) // spec.shape[0]
    for layer in range(spec.shape[0]):
        group = tuple(entries[layer * per_layer : (layer + 1) * per_layer])
        cell = (layer, *[0] * (len(spec.shape) - 1))
        yield Unit(first + layer, name, cell, group, 0, 0, spec.chunk_bytes, spec.chunk_bytes)
