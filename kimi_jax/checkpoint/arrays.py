"""Arrays of a checkpoint, created, written and read piece by piece, in the layout that Orbax restores.

    STATE/NAME/zarr.json     shape, dtype and chunk shape; NAME is the path in the tree: params.moe_layers.attn.q_a
    STATE/NAME/c/1/7/0/0     one chunk: its bytes, little-endian, uncompressed, the last of an axis padded to full size
                             and the axes in an order of the array's own, which readers do not notice
    STATE/_METADATA          the list of arrays, written by ``finalise``: what Orbax needs to restore them

Reading or writing a slice holds the chunks that it touches and no more. Any number of processes may write different
chunks of one array. What Orbax itself wrote (one OCDBT database for all arrays) is read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from kimi_jax.checkpoint import paths
from kimi_jax.errors import UserError, os_errors_as

CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False}
HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
UNFINISHED = ".__lock"  # ends the name of a chunk's file while TensorStore writes it
DICT_KEY = 2  # Orbax's code for the key of a dict
Index = tuple[slice | int, ...]


@dataclass(frozen=True)
class ArraySpec:
    """One array on disk. A chunk is what one write fills and the least that one read fetches."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    order: tuple[int, ...]  # of the axes within a chunk's file, slowest first

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))


class Arrays:
    """The arrays of one ``state`` folder, by name."""

    def __init__(self, folder: paths.AnyPath, stores: dict[str, Any]):
        self._folder, self._stores = folder, stores

    @classmethod
    def create(cls, folder: paths.AnyPath, specs: Mapping[str, ArraySpec]) -> Arrays:
        """Empty arrays for writing; those that are there already, as another process or an earlier one made them."""
        context = ts.Context(CONTEXT)
        opened = {name: ts.open(_zarr3(folder, name, spec), context=context) for name, spec in specs.items()}
        return cls(folder, {name: _result(store, folder, name) for name, store in opened.items()})

    @classmethod
    def open(cls, folder: paths.AnyPath, cache_bytes: int = 0) -> Arrays:
        """The arrays of a finished state, for reading; ``cache_bytes`` of chunks that were read are kept."""
        try:
            listed = json.loads(paths.read_text(paths.join(folder, "_METADATA")))
            ocdbt, driver = listed["use_ocdbt"], "zarr3" if listed["use_zarr3"] else "zarr"
            has_zeros = listed.get("store_array_data_equal_to_fill_value", False)  # then a missing chunk is damage
            leaves = [
                leaf for leaf in listed["tree_metadata"].values() if not leaf["value_metadata"]["skip_deserialize"]
            ]
            keys = [[str(k["key"]) for k in leaf["key_metadata"]] for leaf in leaves]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} is no complete checkpoint: the list of its arrays cannot be read") from error
        context, opened = ts.Context(CONTEXT | {"cache_pool": {"total_bytes_limit": cache_bytes}}), {}
        for name in map(".".join, keys):
            kvstore = paths.kvstore(folder if ocdbt else paths.join(folder, name))
            if ocdbt:
                kvstore = {"driver": "ocdbt", "base": kvstore, "path": name + "/"}
            spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": not has_zeros}
            opened[name] = ts.open(spec, open=True, read=True, context=context)
        return cls(folder, {name: _result(store, folder, name) for name, store in opened.items()})

    def names(self) -> list[str]:
        return list(self._stores)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._store(name).shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._store(name).dtype.numpy_dtype)

    def chunk(self, name: str) -> tuple[int, ...]:
        """The shape that reads best: aligned slices of it touch one chunk each."""
        return tuple(self._store(name).chunk_layout.read_chunk.shape or ())  # None for a scalar

    def order(self, name: str) -> tuple[int, ...]:
        """The axes as they follow each other in the files, slowest first."""
        return tuple(self._store(name).chunk_layout.inner_order)

    def spec(self, name: str) -> ArraySpec:
        return ArraySpec(self.shape(name), self.dtype(name), self.chunk(name), self.order(name))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A slice, in memory, as numpy would index the array."""
        return np.asarray(_result(self._store(name)[(*index, ...)].read(), self._folder, name))

    def read_stored(self, name: str, index: Index = ()) -> np.ndarray:
        """The same slice with its axes in the order of the files: a copy of bytes, nothing is transposed."""
        return np.asarray(_result(self._in_file_order(name, index).read(), self._folder, name))

    def read_chunk(self, name: str, cell: tuple[int, ...]) -> np.ndarray:
        """The chunk at ``cell`` of the grid, in the order of its file, without padding."""
        return self.read_stored(name, self._slices(name, cell))

    def write_chunk(self, name: str, cell: tuple[int, ...], data: np.ndarray) -> None:
        """Writes what ``read_chunk`` reads, of whatever shape; returns when it is in the file, whole."""
        if paths.is_remote(self._folder):
            view = self._in_file_order(name, self._slices(name, cell))
            writing = view.write(data.reshape(view.shape), can_reference_source_data_indefinitely=True)
            _result(writing, self._folder, name)
            return
        spec = self.spec(name)
        step, size = spec.chunk_bytes, data.nbytes
        assert data.dtype == spec.dtype and data.flags.c_contiguous and size <= step, name
        file = paths.join(self._folder, chunk_file(name, cell))
        with os_errors_as(file):
            paths.write_file(file, data, zeros=step - size, suffix=UNFINISHED)

    def _slices(self, name: str, cell: tuple[int, ...]) -> Index:
        grid = zip(cell, self.chunk(name), self.shape(name), strict=True)
        return tuple(slice(i * step, min((i + 1) * step, n)) for i, step, n in grid)

    def _in_file_order(self, name: str, index: Index) -> Any:
        index = (*index, *[slice(None)] * (len(self.shape(name)) - len(index)))
        kept = [axis for axis, i in enumerate(index) if isinstance(i, slice)]
        axes = [kept.index(axis) for axis in self.order(name) if axis in kept]
        return self._store(name)[index].transpose(axes)

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            raise UserError(f"{self._folder} has no array {name}")
        return self._stores[name]


def finalise(folder: paths.AnyPath, specs: Mapping[str, ArraySpec]) -> None:
    """Lists the arrays, all of whose chunks are written: from now on Orbax restores them."""
    tree = {}
    for name, spec in specs.items():
        keys = name.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
            "value_metadata": {  # as arrays of numpy, which need no device to be restored; with a sharding, of jax
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(spec.shape),
            },
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    paths.write_text(paths.join(folder, "_METADATA"), json.dumps(metadata))
    about = {"item_handlers": HANDLER, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    paths.write_text(paths.join(folder, "_CHECKPOINT_METADATA"), json.dumps(about))
    paths.write_text(paths.join(folder, "commit_success.txt"), "")


def chunk_file(name: str, cell: tuple[int, ...]) -> str:
    """Where the chunk at ``cell`` of the grid lies, below the state folder."""
    return "/".join((name, "c", *map(str, cell)))


def _zarr3(folder: paths.AnyPath, name: str, spec: ArraySpec) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": paths.kvstore(paths.join(folder, name)),
        "metadata": {
            "shape": list(spec.shape),
            "data_type": spec.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk)}},
            "codecs": [
                {"name": "transpose", "configuration": {"order": list(spec.order)}},
                {"name": "bytes", **({} if spec.dtype.itemsize == 1 else {"configuration": {"endian": "little"}})},
            ],
        },
        "store_data_equal_to_fill_value": True,  # or chunks of zeros are left out, and Orbax calls them missing
        "open": True,
        "create": True,
    }


def _result(future: Any, folder: paths.AnyPath, name: str) -> Any:
    """What a TensorStore operation gives, its failure as one line."""
    try:
        return future.result()
    except Exception as error:
        raise UserError(f"{paths.join(folder, name)}: {paths.reason(error)}") from error
