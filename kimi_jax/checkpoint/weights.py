"""The weights of a checkpoint of any kind, read as Hugging Face tensors, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from kimi_jax.checkpoint import fp8, manager, paths
from kimi_jax.checkpoint.arrays import Arrays
from kimi_jax.checkpoint.hf_names import Entry
from kimi_jax.checkpoint.source import Source
from kimi_jax.config import ModelConfig, from_dict
from kimi_jax.dims import by_name
from kimi_jax.errors import UserError
from kimi_jax.model import specs

PIECE_BYTES = 64 << 20  # of the f32 weights that are held at a time
CACHE_BYTES = 256 << 20  # of chunks that hold more than one tensor, such as the scales of a layer's experts


class Rows(NamedTuple):
    """Some rows of a Hugging Face tensor."""

    values: np.ndarray  # [rows, in] for a matrix, as stored
    scale: np.ndarray | None  # f32 [blocks of rows, blocks of in], of fp8 values alone

    def in_f32(self, name: str, block: tuple[int, int]) -> np.ndarray:
        if self.scale is not None:
            return fp8.dequantise(self.values, self.scale, name, block)
        return self.values.astype(np.float32, copy=False)


def pieces(entry: Entry, block_rows: int) -> Iterator[tuple[int, int]]:
    """Cuts a tensor into ranges of whole rows of blocks, of about PIECE_BYTES in f32 each."""
    rows, width = entry.shape[0], math.prod(entry.shape[1:])
    step = max(1, PIECE_BYTES // (4 * width * block_rows)) * block_rows
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class Weights(Protocol):
    """A checkpoint as a reader of the tensors that ``hf_names.plan(cfg)`` lists."""

    @property
    def where(self) -> str:
        """For messages."""
        ...

    @property
    def cfg(self) -> ModelConfig: ...

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share an fp8 scale."""
        ...

    def dtype(self, entry: Entry) -> np.dtype:
        """As stored; e4m3 weights come with scales."""
        ...

    def read(self, entry: Entry, start: int, stop: int) -> Rows:
        """Rows start..stop; ``start`` must be a multiple of the block."""
        ...


def open_weights(path: paths.AnyPath) -> Weights:
    """A Hugging Face directory, a converted target, a training workdir (its newest step) or one of its steps."""
    if paths.exists(paths.join(path, "config.json")):
        return HfWeights(Source.open(path))
    return CheckpointWeights.open(path)


@dataclass(frozen=True)
class HfWeights:
    """A Hugging Face directory; int4 weights appear in f32."""

    source: Source

    @property
    def where(self) -> str:
        return self.source.folder

    @property
    def cfg(self) -> ModelConfig:
        return self.source.cfg

    @property
    def block(self) -> tuple[int, int]:
        return self.source.quantisation.block

    def dtype(self, entry: Entry) -> np.dtype:
        packed = entry.name not in self.source.tensors
        return np.dtype(np.float32) if packed else self.source.tensors[entry.name].dtype

    def read(self, entry: Entry, start: int, stop: int) -> Rows:
        dtype = self.dtype(entry)
        values = self.source.rows(entry, start, stop, dtype)
        if dtype != fp8.E4M3:
            return Rows(values, None)
        return Rows(values, self.source.scale(entry)[_blocks(start, stop, self.block)])


@dataclass(frozen=True)
class CheckpointWeights:
    """A finished converted target, or one step of a training run."""

    where: str
    meta: dict[str, Any]
    cfg: ModelConfig
    block: tuple[int, int]  # rows and columns that share an fp8 scale, in the Hugging Face orientation
    arrays: Arrays

    @classmethod
    def open(cls, path: paths.AnyPath) -> CheckpointWeights:
        folder = manager.find(path)
        if folder is None:
            raise UserError(f"{path} holds no complete checkpoint")
        meta = manager.read_meta(folder)
        cfg = from_dict(ModelConfig, meta["config"]["model"], "model")
        rows, columns = meta.get("fp8_block") or fp8.BLOCK
        arrays = Arrays.open(paths.join(folder, "state"), CACHE_BYTES)
        for name, spec in by_name(specs(cfg)):
            shape = arrays.shape(f"params.{name}")
            if shape != spec.shape:
                raise UserError(f"{folder}: {name} has shape {shape}, the config says {spec.shape}")
        return cls(str(folder), meta, cfg, (rows, columns), arrays)

    def dtype(self, entry: Entry) -> np.dtype:
        return self.arrays.dtype(f"params.{'.'.join(entry.path)}")

    def scale_dtype(self, entry: Entry) -> np.dtype:
        return self.arrays.dtype(f"scales.{'.'.join(entry.path)}")

    def read(self, entry: Entry, start: int, stop: int) -> Rows:
        name = ".".join(entry.path)
        if entry.inputs:
            values = self._matrix(f"params.{name}", entry, start, stop)
        else:
            values = self.arrays.read(f"params.{name}", (*entry.index, slice(start, stop)))
        if values.dtype != fp8.E4M3:
            return Rows(values, None)
        scale = self.arrays.read(f"scales.{name}", entry.index).T
        return Rows(values, np.ascontiguousarray(scale[_blocks(start, stop, self.block)]))

    def _matrix(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """Rows of a matrix, [rows, in], one chunk of the input side at a time.

        The rows are our output axes, flat; what lies in the files between the first and the last of the first such
        axis is read.
        """
        n_stacks = len(entry.index)
        first_out = n_stacks + entry.inputs
        inner = math.prod(entry.ours[entry.inputs + 1 :])  # rows for each step of the first output axis
        outs = slice(start // inner, -(-stop // inner))
        wanted = slice(start - outs.start * inner, stop - outs.start * inner)
        n, step = entry.ours[0], self.arrays.chunk(name)[n_stacks]
        width = entry.shape[1] // n  # columns for each step of the first input axis
        as_hf = self.arrays.order(name)[-1] < first_out  # the input side varies fastest in the files
        values = np.empty((stop - start, entry.shape[1]), self.arrays.dtype(name))
        for i in range(0, n, step):
            ins = slice(i, min(i + step, n))
            index = (*entry.index, ins, *[slice(None)] * (entry.inputs - 1), outs)
            part = self.arrays.read_stored(name, index)
            columns = (ins.stop - i) * width
            part = part.reshape(-1, columns) if as_hf else part.reshape(columns, -1).T
            if part.shape == values.shape and part.flags.c_contiguous:
                return part
            values[:, i * width : ins.stop * width] = part[wanted]
        return values


def _blocks(start: int, stop: int, block: tuple[int, int]) -> slice:
    """The rows of scales that belong to rows of weights."""
    return slice(start // block[0], -(-stop // block[0]))
