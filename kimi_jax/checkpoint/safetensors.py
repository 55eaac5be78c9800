"""Reading safetensors files with numpy: nothing is loaded until it is used.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import paths
from kimi_jax.errors import UserError, os_errors_as

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: ``nbytes`` bytes of ``file`` from ``start``."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: paths.AnyPath) -> dict[str, Stored]:
    """The tensors of one file, local or remote, from its header alone. The file must be long enough for all of them."""
    with os_errors_as(f"cannot read {path}"):
        size = paths.size(path)
        start = paths.read_bytes(path, 0, min(8, size))
        length = int.from_bytes(start, "little")
        if size < 8:
            raise UserError(f"{path} is truncated: {size} bytes")
        if length > size - 8:
            raise UserError(f"{path} is truncated or no safetensors file: its header should have {length} bytes")
        encoded = paths.read_bytes(path, 8, 8 + length) if length else b""
    try:
        header = json.loads(encoded)
        header.pop("__metadata__", None)
        data = (8 + length, size - 8 - length)
        tensors = {name: _stored(path, name, entry, *data) for name, entry in header.items()}
        _check_no_gaps(path, [entry["data_offsets"] for entry in header.values()], size - 8 - length)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} has a damaged header: {error}") from error


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one local file, as read-only views of the mapped file."""
    tensors = read_header(path)
    data = np.memmap(path, np.uint8, mode="r")
    return {name: data[t.start : t.start + t.nbytes].view(t.dtype).reshape(t.shape) for name, t in tensors.items()}


def _stored(path: paths.AnyPath, name: str, entry: Mapping[str, Any], data_start: int, data_size: int) -> Stored:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"{name} has shape {shape} and lies at {start}..{end}")
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} has the unknown dtype {entry['dtype']}")
    found = Stored(str(path), np.dtype(DTYPES[entry["dtype"]]), shape, data_start + start)
    if end > data_size:
        raise UserError(f"{path} is truncated: {name} should end at byte {end} of the data, which has {data_size}")
    if end - start != found.nbytes:
        raise UserError(f"{path}: {name} has {end - start} bytes, which is not {shape} of {found.dtype}")
    return found


def _check_no_gaps(path: paths.AnyPath, spans: list[list[int]], size: int) -> None:
    """The format wants every byte of the data in exactly one tensor."""
    covered = 0
    for start, end in sorted(spans):
        if start != covered:
            raise UserError(f"{path} is damaged: its tensors overlap or leave a gap at byte {covered} of the data")
        covered = end
    if covered != size:
        raise UserError(f"{path} is damaged: its tensors end at byte {covered} of the data, which has {size}")


def read_headers(folder: paths.AnyPath) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers alone, whatever the layout of the shards.

    With an index, the files that it names; otherwise every ``*.safetensors`` in the folder. A ``model.safetensors``
    that the index does not name replaces it: that is how transformers overwrites a larger model.
    """
    there = paths.sizes(folder)
    expected = read_index(folder) if INDEX in there else {}
    files = sorted(set(expected.values())) or sorted(name for name in there if name.endswith(".safetensors"))
    if expected and WHOLE in there and WHOLE not in files:
        expected, files = {}, [WHOLE]
    if not files:
        raise UserError(f"{folder} holds no *.safetensors")
    found: dict[str, Stored] = {}
    for file in files:
        path = paths.join(folder, file)
        if not paths.exists(path):
            raise UserError(f"{path} is missing, though {INDEX} names it: the download is incomplete")
        for name, tensor in read_header(path).items():
            if name in found:
                raise UserError(f"{name} is in both {found[name].file} and {path}")
            found[name] = tensor
    for name, file in expected.items():
        if name not in found:
            raise UserError(f"{name} is missing from {paths.join(folder, file)}, where {INDEX} says that it is")
    return found


def read_index(folder: paths.AnyPath) -> dict[str, str]:
    """Name of every tensor -> name of its file."""
    path = paths.join(folder, INDEX)
    found = paths.read_json(path)
    try:
        return {str(name): str(file) for name, file in found["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of safetensors: {error}") from error
