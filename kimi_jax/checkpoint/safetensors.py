"""Reading and writing safetensors files with numpy, by memory map: nothing is loaded until it is used.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.errors import UserError

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
INDEX = "model.safetensors.index.json"


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file, as read-only views of the mapped file."""
    path = Path(path)
    try:
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if size < 8:
        raise UserError(f"{path} is truncated: {size} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > size - 8:
        raise UserError(f"{path} is truncated or no safetensors file: its header should have {length} bytes")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, data[8 + length :]) for name, entry in header.items()}
        _check_no_gaps(path, [entry["data_offsets"] for entry in header.values()], size - 8 - length)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} has a damaged header: {error}") from error


def _tensor(path: Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} has the unknown dtype {entry['dtype']}")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    if end > len(data):
        raise UserError(f"{path} is truncated: {name} should end at byte {end} of the data, which has {len(data)}")
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: {name} has {end - start} bytes, which is not {shape} of {dtype}")
    return data[start:end].view(dtype).reshape(shape)


def _check_no_gaps(path: Path, spans: list[list[int]], size: int) -> None:
    """The format wants every byte of the data in exactly one tensor."""
    covered = 0
    for start, end in sorted(spans):
        if start != covered:
            raise UserError(f"{path} is damaged: its tensors overlap or leave a gap at byte {covered} of the data")
        covered = end
    if covered != size:
        raise UserError(f"{path} is damaged: its tensors end at byte {covered} of the data, which has {size}")


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file, in the order given; it appears when it is complete, and maps of an older one stay valid."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
    unfinished.replace(path)


def read_directory(folder: Path) -> dict[str, tuple[np.ndarray, Path]]:
    """Every tensor of a checkpoint and the file that it is in, whatever the layout of the shards.

    With an index, the files that it names; otherwise every ``*.safetensors`` in the folder. A ``model.safetensors``
    that the index does not name replaces it: that is how transformers overwrites a larger model.
    """
    folder = Path(folder)
    index, whole = folder / INDEX, folder / "model.safetensors"
    files = sorted(folder.glob("*.safetensors"))
    expected: dict[str, str] = {}
    if index.exists():
        try:
            expected = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(expected.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors: {error}") from error
        if whole.exists() and whole not in files:
            expected, files = {}, [whole]
    if not files:
        raise UserError(f"{folder} holds no *.safetensors")
    found: dict[str, tuple[np.ndarray, Path]] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, though {INDEX} names it: the download is incomplete")
        for name, tensor in read(file).items():
            if name in found:
                raise UserError(f"{name} is in both {found[name][1]} and {file}")
            found[name] = (tensor, file)
    for name, file in expected.items():
        if name not in found:
            raise UserError(f"{name} is missing from {folder / file}, where {INDEX} says that it is")
    return found
