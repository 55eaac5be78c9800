"""Parameters on their devices, read tensor by tensor: each process reads what its own devices hold, and that once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from kimi_jax.checkpoint.hf_names import Entry, plan
from kimi_jax.config import ModelConfig
from kimi_jax.dims import Params
from kimi_jax.errors import UserError
from kimi_jax.model import specs

Read = Callable[[Entry, np.dtype], np.ndarray]  # one tensor, as Hugging Face has it, in a dtype


def read_params(cfg: ModelConfig, shardings: Any, read: Read) -> Params:
    """All parameters in ``cfg.param_dtype``, buffers in f32, placed as ``shardings`` says, a nested dict like them."""
    by_path: dict[tuple[str, ...], dict[tuple[int, ...], Entry]] = {}
    for entry in plan(cfg):
        by_path.setdefault(entry.path, {})[entry.index] = entry
    params: dict = {}
    for path, entries in by_path.items():
        *folders, name = path
        spec, sharding, node = specs(cfg), shardings, params
        for key in path:
            spec, sharding = spec[key], sharding[key]
        for key in folders:
            node = node.setdefault(key, {})
        dtype = np.dtype(np.float32 if spec.is_buffer else cfg.param_dtype)
        node[name] = _placed(spec.shape, dtype, sharding, entries, read)
    return params


def _placed(
    shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, entries: dict[tuple[int, ...], Entry], read: Read
) -> jax.Array:
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        devices.setdefault(ranges, []).append(device)
    shards = []
    for ranges, owners in devices.items():
        part = _shard(ranges, dtype, entries, read)
        shards += [jax.device_put(part, device) for device in owners]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _shard(
    ranges: tuple[tuple[int, int], ...], dtype: np.dtype, entries: dict[tuple[int, ...], Entry], read: Read
) -> np.ndarray:
    """The slice ``ranges`` of a parameter, from the tensors that it touches."""
    out = np.empty([stop - start for start, stop in ranges], dtype)
    n_stacks = len(next(iter(entries)))
    starts = [start for start, _ in ranges[:n_stacks]]
    within = tuple(slice(*r) for r in ranges[n_stacks:])
    for index in itertools.product(*(range(*r) for r in ranges[:n_stacks])):
        entry = entries[index]
        part = entry.from_hf(read(entry, dtype))[within]
        if not np.isfinite(part).all():
            raise UserError(f"{entry.name} holds NaN or infinity, or what is too large for {dtype}")
        out[tuple(i - start for i, start in zip(index, starts, strict=True))] = part
    return out
