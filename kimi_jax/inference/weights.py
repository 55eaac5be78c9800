"""Weights as they are served: bf16, or in eight bits with scales, and how a mesh splits either.

    bf16   in ``cfg.dtype``
    fp8    every projection in e4m3 with block scales: the bytes and scales of a released checkpoint as they are
    int8   every projection in int8 with a scale for every output channel: scale = max|W| / 127, W rounded to nearest

Embedding, head, router and norms are not quantised, as in the release. ``abstract`` declares shapes, dtypes and
placement; ``serving_params`` reads tensor after tensor to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kimi_jax.checkpoint import fp8, paths
from kimi_jax.checkpoint.hf_names import Entry, plan
from kimi_jax.checkpoint.weights import Rows, open_weights
from kimi_jax.config import ModelConfig
from kimi_jax.dims import Params, ParamSpec
from kimi_jax.errors import UserError
from kimi_jax.inference.place import padded_specs
from kimi_jax.inference.sharded import AXIS
from kimi_jax.layers.quantized import Quantized
from kimi_jax.model import specs
from kimi_jax.sharding import rules

FORMATS = {"bf16": None, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
Block = tuple[int, int]


def abstract(
    cfg: ModelConfig, format: str, mesh: Mesh | AbstractMesh | None = None, block: Block = fp8.BLOCK
) -> Params:
    """A ShapeDtypeStruct for every array of the served parameters, with its sharding if there is a mesh.

    On a mesh, axes are padded as ``place.padded_specs`` has it, and scales are repeated for smaller blocks where a
    device's part of an axis is no whole number of blocks. ``block``: of fp8, [out, in] as Hugging Face has matrices.
    """
    if format not in FORMATS:
        raise UserError(f"weights are served in {', '.join(FORMATS)}, not in {format}")
    tree: dict = {}
    declared = padded_specs(cfg, mesh.shape[AXIS]) if mesh else specs(cfg)
    for path, entries in _by_path(cfg).items():
        _put(tree, path, _declared(cfg, format, next(iter(entries.values())), _at(declared, path), mesh, block))
    return tree


def _declared(cfg: ModelConfig, format: str, entry: Entry, spec: ParamSpec, mesh: Any, block: Block) -> Any:
    def array(shape: tuple[int, ...], dtype: Any, parts: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, parts) if mesh else None)

    parts = rules.partition(spec, mesh, rules.SERVE) if mesh else PartitionSpec(*(None for _ in spec.shape))
    dtype = FORMATS[format]
    if dtype is None or "_proj" not in entry.name:
        in_own = "router" in spec.axes  # which runs in f32
        return array(spec.shape, jnp.float32 if spec.is_buffer else cfg.param_dtype if in_own else cfg.dtype, parts)
    n_stacks = len(entry.index)
    blocks, scale_shape, scale_parts = [], list(spec.shape), list(parts)
    for at, own in enumerate(_blocks(entry, hf_block(format, entry, block)), start=n_stacks):
        size, n = spec.shape[at], mesh.shape[AXIS] if parts[at] else 1
        if own >= entry.ours[at - n_stacks]:  # one scale for all of the axis
            blocks.append(size)
            scale_parts[at] = None
        else:
            blocks.append(math.gcd(own, size // n) if n > 1 else own)
        scale_shape[at] = -(-size // blocks[-1])
    values, scale = array(spec.shape, dtype, parts), array(tuple(scale_shape), jnp.float32, PartitionSpec(*scale_parts))
    return Quantized(values, scale, tuple(blocks))  # pyright: ignore[reportArgumentType]


def hf_block(format: str, entry: Entry, block: Block) -> Block:
    """Rows and columns of a Hugging Face matrix that share a scale."""
    return block if format == "fp8" else (1, entry.shape[1])


def _blocks(entry: Entry, block: Block) -> list[int]:
    """Blocks of our axes that do not cross those of the Hugging Face matrix, whose sides may be two of our axes."""

    def side(axes: tuple[int, ...], block: int) -> list[int]:
        if block >= math.prod(axes):
            return list(axes)
        return [*(1 for _ in axes[:-1]), math.gcd(block, axes[-1]) if len(axes) > 1 else block]

    return [*side(entry.ours[: entry.inputs], block[1]), *side(entry.ours[entry.inputs :], block[0])]


Read = Callable[[Entry], Rows]  # one tensor, as Hugging Face has it, in any dtype


def serving_params(declared: Params, cfg: ModelConfig, format: str, read: Read, block: Block = fp8.BLOCK) -> Params:
    """The weights that ``read`` gives, as ``declared`` by ``abstract``: each process reads what its own devices hold.

    fp8 that is served in fp8 keeps its bytes and scales; all else passes through f32. ``block``: of fp8, read and
    served. Raises ``UserError`` on what is not finite.
    """
    params: dict = {}
    for path, entries in _by_path(cfg).items():
        _put(params, path, _place(_at(declared, path), entries, format, read, block))
    return params


def read_served(
    path: paths.AnyPath, format: str, mesh: Mesh | None = None, dtype: str = "bfloat16"
) -> tuple[ModelConfig, Params]:
    """The model at ``path``, of any kind that ``kimi_jax.load`` takes, computing in ``dtype``, and its weights."""
    weights = open_weights(path)
    cfg = weights.cfg.replace(dtype=dtype, param_dtype="float32")
    declared = abstract(cfg, format, mesh, weights.block)
    return cfg, serving_params(declared, cfg, format, lambda e: weights.read(e, 0, e.shape[0]), weights.block)


def held(params: Params) -> Read:
    """Reads weights that are in memory."""
    return lambda entry: Rows(entry.to_hf(np.asarray(_at(params, entry.path)[entry.index])), None)


def _place(leaf: Any, entries: Mapping[tuple[int, ...], Entry], format: str, read: Read, block: Block) -> Any:
    """One parameter. Devices that hold the same layers and experts share what is read of them."""
    arrays, tree = jax.tree.flatten(leaf)
    n_stacks = len(next(iter(entries)))
    shards: list[dict[tuple, jax.Array]] = [{} for _ in arrays]
    for stack, devices in _by_stack(arrays[0], n_stacks).items():
        ranges = [_ranges(array, n_stacks, stack) for array in arrays]
        wanted = [sorted({r[device] for device in devices}) for r in ranges]
        shape = tuple(stop - start for start, stop in stack)
        buffers = [
            {key: np.zeros((*shape, *(stop - start for start, stop in key)), array.dtype) for key in keys}
            for array, keys in zip(arrays, wanted, strict=True)
        ]

        def fill(offset: tuple[int, ...], stack=stack, buffers=buffers) -> None:
            entry = entries.get(tuple(start + i for (start, _), i in zip(stack, offset, strict=True)))
            if entry is None:  # padding
                return
            for part, ours in zip(_parts(leaf, entry, format, read(entry), block), buffers, strict=True):
                for key, buffer in ours.items():
                    own = part[tuple(slice(*r) for r in key)]
                    buffer[(*offset, *map(slice, own.shape))] = own

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, np.ndindex(shape)))
        for at, r in enumerate(ranges):
            for device in devices:
                shards[at][device] = jax.device_put(buffers[at][r[device]], device)
    placed = [
        jax.make_array_from_single_device_arrays(array.shape, _sharding(array), list(found.values()))
        for array, found in zip(arrays, shards, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def _parts(leaf: Any, entry: Entry, format: str, rows: Rows, block: Block) -> tuple[np.ndarray, ...]:
    """A tensor as its slices of the parameter's arrays: the weights, or values and scales."""
    if not isinstance(leaf, Quantized):
        w = entry.from_hf(rows.in_f32(entry.name, block) if rows.scale is not None else rows.values)
        w = w.astype(leaf.dtype)
        if not np.isfinite(w).all():
            raise UserError(f"{entry.name} holds NaN or infinity, or what is too large for {leaf.dtype}")
        return (w,)
    if format == "fp8" and rows.scale is not None:
        values, scale = rows.values, rows.scale.astype(np.float32)
    else:
        w = rows.in_f32(entry.name, block)
        values, scale = fp8.quantise(w, block) if format == "fp8" else to_int8(w)
    if not np.isfinite(scale).all():
        raise UserError(f"{entry.name} holds NaN or infinity")
    ins, outs = entry.ours[: entry.inputs], entry.ours[entry.inputs :]
    blocks, (rows_of_one, columns_of_one) = leaf.blocks, hf_block(format, entry, block)
    row = _firsts(outs, blocks[entry.inputs :]) // rows_of_one
    column = _firsts(ins, blocks[: entry.inputs]) // columns_of_one
    ours = [-(-size // block) for size, block in zip(entry.ours, blocks, strict=True)]
    return entry.from_hf(values), scale[np.ix_(row, column)].T.reshape(ours)


def to_int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q, scale)`` of a matrix [out, in] in f32: scale [out, 1] = max|W| / 127, 1 for a row of zeros."""
    largest = np.abs(w).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny))
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(w / scale), -127, 127).astype(np.int8), scale.astype(np.float32)


def _firsts(sizes: tuple[int, ...], blocks: tuple[int, ...]) -> np.ndarray:
    """Where, on an axis that fuses axes of these sizes, the first element of every block lies."""
    found = np.zeros(1, np.int64)
    for size, block in zip(sizes, blocks, strict=True):
        found = np.add.outer(found * size, np.arange(0, size, block)).reshape(-1)
    return found


def _sharding(array: jax.ShapeDtypeStruct) -> Sharding:
    return array.sharding or SingleDeviceSharding(jax.devices()[0])


def _by_stack(array: jax.ShapeDtypeStruct, n_stacks: int) -> dict[tuple[tuple[int, int], ...], list[Any]]:
    """This process's devices, by the ranges of layers and experts that they hold."""
    found: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, ranges in _all_ranges(array).items():
        found.setdefault(ranges[:n_stacks], []).append(device)
    return found


def _ranges(array: jax.ShapeDtypeStruct, n_stacks: int, stack: tuple) -> dict[Any, tuple]:
    """What of the matrix each device of ``stack`` holds."""
    return {device: r[n_stacks:] for device, r in _all_ranges(array).items() if r[:n_stacks] == stack}


def _all_ranges(array: jax.ShapeDtypeStruct) -> dict[Any, tuple[tuple[int, int], ...]]:
    indices = _sharding(array).addressable_devices_indices_map(array.shape)
    return {
        device: tuple(s.indices(n)[:2] for s, n in zip(index or (), array.shape, strict=True))
        for device, index in indices.items()
    }


def _by_path(cfg: ModelConfig) -> dict[tuple[str, ...], dict[tuple[int, ...], Entry]]:
    """The tensors that make up each parameter."""
    found: dict[tuple[str, ...], dict[tuple[int, ...], Entry]] = {}
    for entry in plan(cfg):
        found.setdefault(entry.path, {})[entry.index] = entry
    return found


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
