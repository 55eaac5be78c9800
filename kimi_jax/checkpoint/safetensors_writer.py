"""A directory of safetensors shards, planned from names, shapes and dtypes alone and filled piece by piece.

    shards = plan_shards(tensors, shard_size)          # model-00001-of-000NN.safetensors, ...
    for shard in shards:
        if not is_complete(folder, shard):
            with writing(folder, shard) as file:
                file.write(name, first_element, piece)  # in any order, by any number of threads
    write_index(folder, shards)

A shard has its full size from the start, under an ``.unfinished`` name that it loses when every byte is written. The
index comes last.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.checkpoint.safetensors import DTYPES, INDEX
from kimi_jax.errors import os_errors_as

METADATA = {"format": "pt"}  # without it transformers refuses a file
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order of their bytes."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def header(self) -> bytes:
        """Everything before the data."""
        return _header(self.tensors)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Iterable[TensorSpec], shard_size: int) -> list[Shard]:
    """Files of at most ``shard_size`` bytes, filled in the order given; a tensor that is larger has one of its own.

    Inside a file wide types come first, so that each tensor starts at a multiple of its element's size.
    """
    groups: list[list[TensorSpec]] = []
    room = 0
    for tensor in tensors:
        needed = tensor.nbytes + _ENTRY_BYTES + len(json.dumps(tensor.name)) + 20 * len(tensor.shape)
        if needed > room or not groups:
            groups.append([])
            room = shard_size - len(_header([])) - 8
        groups[-1].append(tensor)
        room -= needed
    return [
        Shard(
            f"model-{i:05}-of-{len(groups):05}.safetensors",
            tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)),
        )
        for i, group in enumerate(groups, 1)
    ]


_ENTRY_BYTES = 100  # of a tensor in the header, beside its name and shape, at most


def _header(tensors: Iterable[TensorSpec]) -> bytes:
    entries: dict = {"__metadata__": METADATA}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        dtype = _NAMES[tensor.dtype]
        entries[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def is_complete(folder: Path, shard: Shard) -> bool:
    """Whether the shard is there, whole and under its own name, with the tensors that it should have."""
    path, header = Path(folder) / shard.file, shard.header
    try:
        with open(path, "rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == len(header) + shard.data_bytes
    except FileNotFoundError:
        return False


class ShardFile:
    """A preallocated shard that takes pieces of its tensors."""

    def __init__(self, path: Path, fd: int, shard: Shard):
        self._path, self._fd, self._lock = path, fd, threading.Lock()
        sizes = [tensor.nbytes for tensor in shard.tensors]
        starts = itertools.accumulate(sizes, initial=len(shard.header))
        self._tensors = {tensor.name: (tensor, start) for tensor, start in zip(shard.tensors, starts, strict=False)}
        self.missing = sum(sizes)  # bytes that are not written yet

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def write(self, name: str, first: int, data: np.ndarray) -> None:
        """Puts ``data`` at element ``first`` of the flat tensor. No element may be written twice."""
        tensor, start = self._tensors[name]
        assert data.dtype == tensor.dtype and first + data.size <= math.prod(tensor.shape), name
        view = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        with os_errors_as(f"cannot write {self._path}"):
            _write_all(self._fd, view, start + first * data.dtype.itemsize)
        with self._lock:
            self.missing -= data.nbytes


@contextmanager
def writing(folder: Path, shard: Shard) -> Iterator[ShardFile]:
    """The shard's file for writing. It appears under its name when the block ends without an error, all written."""
    path = Path(folder) / shard.file
    unfinished = path.with_name(path.name + ".unfinished")
    with os_errors_as(f"cannot write {unfinished}"):
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with os_errors_as(f"cannot write {unfinished}"):
            header = shard.header
            _allocate(fd, len(header) + shard.data_bytes)
            _write_all(fd, memoryview(header), 0)
        target = ShardFile(unfinished, fd, shard)
        yield target
        assert target.missing == 0, f"{path}: {target.missing} bytes were not written"
        with os_errors_as(f"cannot write {unfinished}"):
            os.fsync(fd)
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # a full disk has use for the room
        raise
    finally:
        os.close(fd)


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file of its own, in the order given; it appears when it is complete, and maps of an older one stay valid."""
    specs = [TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    with writing(path.parent, Shard(path.name, tuple(specs))) as file:
        for name, tensor in tensors.items():
            file.write(name, 0, tensor)


def _allocate(fd: int, size: int) -> None:
    """Reserves the room, so that a full disk is found at once; where the file system cannot, sets the length."""
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(fd, size)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def write_index(folder: Path, shards: Iterable[Shard], **metadata: Any) -> None:
    """The list of tensors and their files, with ``metadata``. A directory with all shards and this is complete."""
    shards = list(shards)
    files = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    about = {"total_size": sum(shard.data_bytes for shard in shards), **metadata}
    index = {"metadata": about, "weight_map": dict(sorted(files.items()))}
    write_bytes(Path(folder) / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The file appears when it is complete."""
    unfinished = path.with_name(path.name + ".unfinished")
    with os_errors_as(f"cannot write {path}"):
        unfinished.write_bytes(content)
        unfinished.replace(path)
