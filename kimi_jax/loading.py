"""``kimi_jax.load``: a model and its weights, from a Hugging Face directory or from our own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.checkpoint import fp8, safetensors
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, STRAY, Entry, plan
from kimi_jax.config import ModelConfig, from_dict
from kimi_jax.dims import Params, ParamSpec, is_spec, map_specs
from kimi_jax.errors import UserError
from kimi_jax.model import KimiK2, specs

FLOATS = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> tuple[KimiK2, Params]:
    """``(model, params)`` such that ``model.apply({"params": params}, tokens_BT)`` gives f32 logits.

    ``path``: a Hugging Face directory (bf16, f32 or block-fp8 safetensors), or a training workdir, its checkpoints or
    one step. ``dtype``: of weights and computation; by default weights keep the stored dtype (fp8 becomes exact f32)
    and the computation runs in bf16 if they are bf16, else in f32. ``mesh``: replicates the weights over its devices.
    The whole model is held in memory. Raises ``UserError`` on anything missing, left over, truncated or not finite.
    """
    path = Path(path).expanduser()
    wanted = None if dtype is None else _compute_dtype(dtype)
    if not path.exists():
        raise UserError(f"there is no {path}")
    if (path / "config.json").exists():
        cfg, params = _from_hf(path, wanted)
    elif any(path.glob("*.safetensors")):
        raise UserError(f"{path} has safetensors but no config.json")
    else:
        cfg, params = _from_checkpoint(path, wanted)
    placement = NamedSharding(mesh, PartitionSpec()) if mesh else jax.devices()[0]
    return KimiK2(cfg), jax.tree.map(lambda w: jax.device_put(w, placement), params)


def _compute_dtype(dtype: Any) -> np.dtype:
    allowed = [jnp.dtype(name) for name in ("float32", "bfloat16")]
    try:
        return allowed[allowed.index(jnp.dtype(dtype))]
    except (TypeError, ValueError):
        raise UserError(f"dtype must be float32 or bfloat16, not {dtype}") from None


def tokenizer_of(path: str | Path) -> str | None:
    """What ``data.tokenizer.load`` needs to read text for the model at ``path``; None if nothing there says so."""
    path = Path(path).expanduser()
    if (path / "tiktoken.model").exists():
        return str(path / "tiktoken.model")
    if (path / "config.json").exists() or not path.exists():
        return None
    from kimi_jax.checkpoint.manager import read_meta

    return read_meta(path)["config"]["data"]["tokenizer"]


def _from_checkpoint(path: Path, dtype: np.dtype | None) -> tuple[ModelConfig, Params]:
    from kimi_jax.checkpoint.manager import restore_params

    params, meta = restore_params(path)
    cfg = from_dict(ModelConfig, meta["config"]["model"], "model")
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype.name, param_dtype=dtype.name)
        params = jax.tree.map(lambda s, w: w if s.is_buffer else w.astype(dtype), specs(cfg), params, is_leaf=is_spec)
    return cfg, params


def _from_hf(path: Path, dtype: np.dtype | None) -> tuple[ModelConfig, Params]:
    cfg = ModelConfig.from_hf(path / "config.json")
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    tensors = safetensors.read_directory(path)
    entries = list(plan(cfg))
    _check_names(cfg, raw, tensors, entries, path)
    stored = _stored_dtype(tensors, entries) if dtype is None else dtype
    cfg = cfg.replace(dtype=stored.name, param_dtype=stored.name)
    block = _block_size(raw.get("quantization_config") or {})

    def empty(spec: ParamSpec) -> np.ndarray:
        return np.empty(spec.shape, np.float32 if spec.is_buffer else stored)

    params = map_specs(empty, specs(cfg))
    for entry in entries:
        target = params
        for key in entry.path:
            target = target[key]
        with np.errstate(over="ignore"):
            target[entry.index] = entry.from_hf(_weights(entry, tensors, block))
        if not np.isfinite(target[entry.index]).all():
            file = tensors[entry.name][1]
            raise UserError(f"{file}: {entry.name} holds NaN or infinity, or what is too large for {stored.name}")
    return cfg, params


def _block_size(quantisation: dict) -> tuple[int, int]:
    """Rows and columns that share a scale, from ``quantization_config``."""
    if not isinstance(quantisation, dict):
        raise UserError(f"config.json: quantization_config must be an object, not {quantisation!r}")
    method, block = quantisation.get("quant_method", "fp8"), quantisation.get("weight_block_size") or fp8.BLOCK
    if method != "fp8":
        raise UserError(f"config.json: quant_method={method!r} is not supported (only 'fp8' in blocks)")
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise UserError(f"config.json: weight_block_size={block!r} must be two positive numbers")
    return block[0], block[1]


def _check_names(cfg: ModelConfig, raw: dict, tensors: dict, entries: list[Entry], path: Path) -> None:
    planned = {entry.name for entry in entries}
    missing = [name for name in planned if name not in tensors]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"{path} lacks {len(missing)} of {len(planned)} tensors: {some}{', ...' if missing[3:] else ''}"
        )
    scales = {name + SCALE_SUFFIX for name in planned}
    n_extra = raw.get("num_nextn_predict_layers") or 0
    if not isinstance(n_extra, int):
        raise UserError(f"config.json: num_nextn_predict_layers must be int, not {n_extra!r}")
    extra_layers = tuple(f"model.layers.{cfg.num_hidden_layers + i}." for i in range(n_extra))
    unknown = sorted(
        name
        for name in tensors
        if not (name in planned or name in scales or STRAY.fullmatch(name) or name.startswith(extra_layers))
    )
    if unknown:
        some = ", ".join(unknown[:3])
        raise UserError(f"{path} holds {len(unknown)} tensors that this model does not have: {some}")


def _stored_dtype(tensors: dict[str, tuple[np.ndarray, Path]], entries: list[Entry]) -> np.dtype:
    """bf16 if every weight but the router's bias is bf16, else f32, which holds fp8, f16 and bf16 exactly."""
    weights = [tensors[entry.name][0].dtype for entry in entries if entry.path[-1] != "bias"]
    half = all(dtype == ml_dtypes.bfloat16 for dtype in weights)
    return jnp.dtype(jnp.bfloat16 if half else jnp.float32)


def _weights(entry: Entry, tensors: dict[str, tuple[np.ndarray, Path]], block: tuple[int, int]) -> np.ndarray:
    """One tensor, de-quantised if it is fp8, checked for shape and dtype."""
    tensor, file = tensors[entry.name]
    where = f"{file}: {entry.name}"
    if tensor.shape != entry.shape:
        raise UserError(f"{where} has shape {tensor.shape}, but config.json implies {entry.shape}")
    scale_name = entry.name + SCALE_SUFFIX
    if tensor.dtype == ml_dtypes.float8_e4m3fn:
        if scale_name not in tensors:
            raise UserError(f"{where} is fp8, but there is no {scale_name}")
        tensor = fp8.dequantise(tensor, tensors[scale_name][0], where, block)
    elif scale_name in tensors:
        raise UserError(f"{where} is {tensor.dtype}, but there is a {scale_name}: only fp8 weights have scales")
    elif tensor.dtype not in FLOATS:
        raise UserError(f"{where} has dtype {tensor.dtype}, which is not a weight's")
    return tensor
