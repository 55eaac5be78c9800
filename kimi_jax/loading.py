"""``kimi_jax.load``: a model and its weights, from a Hugging Face directory or from our own checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from kimi_jax.checkpoint import paths
from kimi_jax.checkpoint.finish import HF_FOLDER
from kimi_jax.checkpoint.hf_names import Entry
from kimi_jax.checkpoint.manager import read_meta, restore_params
from kimi_jax.checkpoint.placed import read_params
from kimi_jax.checkpoint.source import Source
from kimi_jax.checkpoint.weights import CheckpointWeights
from kimi_jax.config import ModelConfig, from_dict
from kimi_jax.dims import Params, by_name, is_spec, map_specs
from kimi_jax.errors import UserError
from kimi_jax.model import KimiK2, specs
from kimi_jax.sharding.rules import shardings


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> tuple[KimiK2, Params]:
    """``(model, params)`` such that ``model.apply({"params": params}, tokens_BT)`` gives f32 logits.

    ``path``: a Hugging Face directory (bf16, f32, block-fp8 or int4 safetensors), a converted checkpoint, or a training
    workdir, its checkpoints or one step; local, or a URL such as gs://. ``dtype``: of weights and computation; by
    default weights keep the stored dtype (fp8 and int4 become exact f32) and the computation runs in bf16 if they are
    bf16, else in f32, but that of a training run as its config says. ``mesh``: an axis named "expert" splits the
    experts, every other weight is on all devices; each process reads what its devices hold. Raises ``UserError`` on
    anything missing, left over, truncated or not finite.
    """
    cfg, read = _in_dtype(path, dtype)
    if mesh is None:
        here = SingleDeviceSharding(jax.devices()[0])
        where = map_specs(lambda _: here, specs(cfg))
    else:
        where = shardings(specs(cfg), mesh)
    return KimiK2(cfg), read(cfg, where)


def config_of(path: str | Path, dtype: Any = None) -> ModelConfig:
    """Of the model that ``load`` returns."""
    return _in_dtype(path, dtype)[0]


def _in_dtype(path: str | Path, dtype: Any) -> tuple[ModelConfig, Reader]:
    wanted = None if dtype is None else _compute_dtype(dtype)
    cfg, read = _open(paths.local(str(path)))
    return (cfg if wanted is None else cfg.replace(dtype=wanted.name, param_dtype=wanted.name)), read


def load_params(path: str | Path, cfg: ModelConfig, where: Any) -> Params:
    """The weights at ``path`` for a model of ``cfg``, in its dtype, placed as ``where``, a sharding for each.

    Raises ``UserError`` if one has another shape than ``cfg`` asks for: nothing is cut or left out.
    """
    found, read = _open(paths.local(str(path)))
    theirs, ours = _shapes(found), _shapes(cfg)
    for name in (*ours, *theirs):
        if theirs.get(name) != ours.get(name):
            one = f"has shape {theirs[name]}" if name in theirs else "does not exist"
            other = f"has shape {ours[name]}" if name in ours else "does not exist"
            raise UserError(f"{name} {one} in {path} but {other} in the config: change the config's model section")
    return read(cfg, where)


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in by_name(specs(cfg))}


def _compute_dtype(dtype: Any) -> np.dtype:
    allowed = [jnp.dtype(name) for name in ("float32", "bfloat16")]
    try:
        return allowed[allowed.index(jnp.dtype(dtype))]
    except (TypeError, ValueError):
        raise UserError(f"dtype must be float32 or bfloat16, not {dtype}") from None


def tokenizer_of(path: str | Path) -> str | None:
    """What ``data.tokenizer.load`` needs to read text for the model at ``path``; None if nothing there says so."""
    path = paths.local(str(path))
    if not paths.is_remote(path):
        for folder in (Path(path), Path(path) / HF_FOLDER):
            if (folder / "tiktoken.model").exists():
                return str(folder / "tiktoken.model")
    if paths.exists(paths.join(path, "config.json")) or not paths.exists(path):
        return None
    return read_meta(path)["config"]["data"]["tokenizer"]


Reader = Callable[[ModelConfig, Any], Params]  # (config with the dtypes wanted, shardings) -> parameters


def _open(path: str | Path) -> tuple[ModelConfig, Reader]:
    """The config, with the stored dtypes, and what reads the weights."""
    if not paths.exists(path):
        raise UserError(f"there is no {path}")
    if paths.exists(paths.join(path, "config.json")):
        source = Source.open(path)
        stored = source.stored_dtype().name
        cfg = source.cfg.replace(dtype=stored, param_dtype=stored)
        return cfg, partial(read_params, read=lambda entry, dtype: source.rows(entry, 0, entry.shape[0], dtype))
    if any(name.endswith(".safetensors") for name in paths.names(path)):
        raise UserError(f"{path} has safetensors but no config.json")
    meta = read_meta(path)
    cfg = from_dict(ModelConfig, meta["config"]["model"], "model")
    return cfg, partial(_read_converted if "source" in meta else _read_trained, path)


def _read_converted(path: str | Path, cfg: ModelConfig, where: Any) -> Params:
    weights = CheckpointWeights.open(path)

    def read(entry: Entry, dtype: np.dtype) -> np.ndarray:
        rows = weights.read(entry, 0, entry.shape[0])
        return rows.values if rows.values.dtype == dtype else rows.in_f32(entry.name, weights.block).astype(dtype)

    return read_params(cfg, where, read)


def _read_trained(path: str | Path, cfg: ModelConfig, where: Any) -> Params:
    params, _ = restore_params(path, where)
    for keys, w in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(w).all():
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            raise UserError(f"{name} in {path} holds NaN or infinity: use a checkpoint from before that step")
    return jax.tree.map(
        lambda s, w: w if s.is_buffer else w.astype(cfg.param_dtype), specs(cfg), params, is_leaf=is_spec
    )
