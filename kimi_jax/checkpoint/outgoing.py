"""The tensors of an export: in which order and dtype they go out, and their rows, kept, rounded or quantised."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import fp8
from kimi_jax.checkpoint.finite import is_finite
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, Entry, plan
from kimi_jax.checkpoint.safetensors_writer import ShardFile, TensorSpec
from kimi_jax.checkpoint.weights import CheckpointWeights, Rows, pieces
from kimi_jax.errors import UserError

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
Piece = tuple[str, int, int]  # a weight, and the rows start..stop of it


@dataclass(frozen=True)
class Outgoing:
    """Every weight of a checkpoint by its name, layer by layer, and the dtype that it gets."""

    weights: CheckpointWeights
    entries: Mapping[str, Entry]
    dtypes: Mapping[str, np.dtype]

    @classmethod
    def plan(cls, weights: CheckpointWeights, wanted: str | None) -> Outgoing:
        """``wanted``: see ``export.to_hf``."""
        entries = {entry.name: entry for entry in sorted(plan(weights.cfg), key=_layer)}
        stored = {name: weights.dtype(entry) for name, entry in entries.items()}
        has_fp8 = fp8.E4M3 in stored.values()
        return cls(weights, entries, {n: _dtype_out(e, stored[n], wanted, has_fp8) for n, e in entries.items()})

    def tensors(self) -> Iterator[TensorSpec]:
        """Each weight, followed by its scales if it goes out in fp8."""
        for name, entry in self.entries.items():
            yield TensorSpec(name, entry.shape, self.dtypes[name])
            if self.dtypes[name] == fp8.E4M3:
                grid = fp8.grid((entry.shape[0], entry.shape[1]), self.weights.block)
                kept = self.weights.dtype(entry) == fp8.E4M3
                yield TensorSpec(name + SCALE_SUFFIX, grid, self.weights.scale_dtype(entry) if kept else F32)

    def pieces(self, tensors: tuple[TensorSpec, ...]) -> Iterator[Piece]:
        """The work that fills these tensors. A weight whose scales alone are among them is there too."""
        for name in dict.fromkeys(tensor.name.removesuffix(SCALE_SUFFIX) for tensor in tensors):
            for start, stop in pieces(self.entries[name], self.weights.block[0]):
                yield name, start, stop

    def write(self, piece: Piece, file: ShardFile) -> int:
        """Writes what the file holds of a piece: a weight and its scales may be in two files. Gives the bytes."""
        name, start, stop = piece
        weights, entry, dtype = self.weights, self.entries[name], self.dtypes[name]
        values, scale = _in_dtype(weights.read(entry, start, stop), dtype, name, weights.block)
        if not (is_finite(values) and (scale is None or is_finite(scale))):
            raise UserError(f"{weights.where}: {name} holds NaN or infinity, or what is too large for {dtype}")
        parts = [(name, start * math.prod(entry.shape[1:]), values)]
        if scale is not None:
            parts.append((name + SCALE_SUFFIX, start // weights.block[0] * scale.shape[1], scale))
        parts = [part for part in parts if part[0] in file]
        for part in parts:
            file.write(*part)
        return sum(data.nbytes for _, _, data in parts)


def _layer(entry: Entry) -> float:
    """Sorts the embedding first, then layer by layer, the final norm and the head last."""
    layer = re.match(r"model\.layers\.(\d+)\.", entry.name)
    return int(layer[1]) if layer else -1 if entry.path == ("embedding",) else float("inf")


def _dtype_out(entry: Entry, stored: np.dtype, wanted: str | None, has_fp8: bool) -> np.dtype:
    """In which dtype a tensor is exported; every projection of the release is fp8, and nothing else."""
    if wanted is None or entry.path[-1] == "bias":
        return stored
    if wanted == "bf16":
        return BF16
    if "_proj" in entry.name or stored == fp8.E4M3:
        return fp8.E4M3
    return stored if has_fp8 else BF16


def _in_dtype(rows: Rows, dtype: np.dtype, name: str, block: tuple[int, int]) -> Rows:
    """Quantised or rounded, one row of blocks at a time, which stays in the cache."""
    values, scale = rows
    if values.dtype == dtype:
        return rows
    if dtype == fp8.E4M3:
        return Rows(*fp8.quantise(values, block))
    out = np.empty(values.shape, dtype)
    with np.errstate(over="ignore"):
        for i, start in enumerate(range(0, len(values), block[0])):
            at = slice(start, start + block[0])
            out[at] = Rows(values[at], None if scale is None else scale[i : i + 1]).in_f32(name, block)
    return Rows(out, None)
