"""``inspect``: what a path holds, from configs, headers and array metadata alone; no weights are read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import export, manager, paths, progress, safetensors
from kimi_jax.checkpoint.arrays import Arrays
from kimi_jax.checkpoint.hf_config import quantisation_of, read_config
from kimi_jax.checkpoint.report import gib
from kimi_jax.config import ModelConfig, from_dict
from kimi_jax.errors import UserError
from kimi_jax.model import parameter_count


@dataclass(frozen=True)
class Group:
    """Arrays, or tensors whose names differ in the numbers of layers and experts alone."""

    name: str  # with * for such a number
    count: int
    shape: tuple[int, ...]  # of each
    dtype: str
    nbytes: int  # of all


@dataclass(frozen=True)
class Contents:
    """What a path holds. ``str`` is for people, ``dataclasses.asdict`` for programs."""

    path: str
    kind: str
    groups: tuple[Group, ...] = ()
    model: ModelConfig | None = None
    step: int | None = None
    progress: str | None = None  # of something unfinished
    facts: tuple[tuple[str, str], ...] = ()  # whatever else there is to say

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    def as_json(self) -> str:
        parameters = parameter_count(self.model) if self.model else None
        found = dataclasses.asdict(self) | {"facts": dict(self.facts), "bytes": self.nbytes, "parameters": parameters}
        return json.dumps(found, indent=2)

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        lines = [f"{self.path}: {self.kind}{step}"]
        if self.progress:
            lines.append(f"progress: {self.progress}")
        if self.model:
            lines.append(f"model: {_describe(self.model)}")
        lines += [f"{key}: {value}" for key, value in self.facts]
        return "\n".join([*lines, *_table(self.groups), *self._total()])

    def _total(self) -> list[str]:
        sizes: Counter[str] = Counter()
        for group in self.groups:
            sizes[group.dtype] += group.nbytes
        parts = ", ".join(f"{gib(n)} {dtype}" for dtype, n in sizes.most_common())
        number = sum(group.count for group in self.groups)
        return [f"total: {gib(self.nbytes)} in {number:,} arrays: {parts}"] if self.groups else []


def inspect(path: paths.AnyPath) -> Contents:
    """Raises ``UserError`` if there is nothing that this project reads or writes."""
    path = str(path).rstrip("/")
    if not paths.exists(path):
        raise UserError(f"there is no {path}")
    names = set(paths.sizes(path))
    if export.MARKER in names:
        return _unfinished_export(path, names)
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return _hugging_face(path, names)
    step = manager.find(path)
    if step is not None:
        return _checkpoint(str(step))
    if progress.unfinished(path):
        return _unfinished_conversion(path)
    raise UserError(f"{path} holds neither a Hugging Face model nor a checkpoint, finished or not")


def _hugging_face(path: str, names: set[str]) -> Contents:
    if "config.json" not in names:
        return Contents(path, "safetensors without a config.json", _tensors(path))
    config = read_config(path)
    model, method = ModelConfig.from_hf(config), quantisation_of(config).method
    files = sum(name.endswith(".safetensors") for name in names)
    if not files:
        return Contents(path, "Hugging Face config without weights", (), model)
    kind = f"Hugging Face model in {method}" if method else "Hugging Face model"
    return Contents(path, kind, _tensors(path), model, facts=(("files", str(files)),))


def _tensors(path: str) -> tuple[Group, ...]:
    return _grouped((name, t.shape, str(t.dtype), t.nbytes) for name, t in safetensors.read_headers(path).items())


def _grouped(tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> tuple[Group, ...]:
    sizes: dict[tuple, list[int]] = {}
    for name, shape, dtype, nbytes in tensors:
        sizes.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape, dtype), []).append(nbytes)
    return tuple(Group(name, len(n), shape, dtype, sum(n)) for (name, shape, dtype), n in sizes.items())


def _checkpoint(step: str) -> Contents:
    meta, arrays = manager.read_meta(step), Arrays.open(paths.join(step, "state"))
    groups = [_array(name, arrays.shape(name), arrays.dtype(name)) for name in arrays.names()]
    facts = [(key, str(meta[key])) for key in ("dtype", "digest") if key in meta]
    facts += [("source", meta["source"]["digest"])] if "source" in meta else []
    kind = "converted checkpoint" if "source" in meta else "training checkpoint"
    model = from_dict(ModelConfig, meta["config"]["model"], "model")
    return Contents(step, kind, tuple(groups), model, meta["step"], facts=tuple(facts))


def _array(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Group:
    return Group(name, 1, shape, str(dtype), math.prod(shape) * dtype.itemsize)


def _unfinished_conversion(path: str) -> Contents:
    """Its arrays are there from the start; the journals say which of their chunks are."""
    state = paths.join(path, "state")
    groups, chunks = [], 0
    for file in paths.sizes(state, deep=True):
        if file.endswith("/zarr.json"):
            found = json.loads(paths.read_text(paths.join(state, file)))
            shape, dtype = tuple(found["shape"]), found["data_type"]
            chunk = found["chunk_grid"]["configuration"]["chunk_shape"]
            chunks += math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
            dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
            groups.append(_array(file.removesuffix("/zarr.json"), shape, dtype))
    job = json.loads(paths.read_text(paths.join(path, progress.FOLDER, "job.json")))
    done = len(progress.Progress(path, job).done()[0])
    said = f"{done:,} of {chunks:,} chunks are written ({done / max(chunks, 1):.0%}); the same command goes on"
    return Contents(path, "unfinished conversion, which nothing loads", tuple(groups), progress=said)


def _unfinished_export(path: str, names: set[str]) -> Contents:
    files = [name for name in names if name.endswith(".safetensors")]
    of = {int(name.rpartition("-of-")[2].removesuffix(".safetensors")) for name in files if "-of-" in name}
    total = f" of {of.pop():,}" if of else ""
    said = f"{len(files):,}{total} files are written; the same command goes on"
    return Contents(path, "unfinished export", _tensors(path) if files else (), progress=said)


def _describe(cfg: ModelConfig) -> str:
    experts = f"{cfg.n_routed_experts} experts, {cfg.num_experts_per_tok} per token"
    return (
        f"{parameter_count(cfg):,} parameters: {cfg.num_hidden_layers} layers ({cfg.first_k_dense_replace} dense), "
        f"width {cfg.hidden_size}, {cfg.num_attention_heads} heads, {experts}, vocabulary {cfg.vocab_size:,}"
    )


def _table(groups: Iterable[Group]) -> list[str]:
    rows = [
        ("", g.name, f"{g.count:,} x" if g.count > 1 else "", str(list(g.shape)), g.dtype, gib(g.nbytes))
        for g in groups
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
