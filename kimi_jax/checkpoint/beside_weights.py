"""What an exported directory holds beside its weights: config.json, generation_config.json, the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.checkpoint import fp8, paths
from kimi_jax.checkpoint.finish import HF_FOLDER
from kimi_jax.checkpoint.hf_config import read_config
from kimi_jax.checkpoint.weights import CheckpointWeights
from kimi_jax.errors import UserError

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
RANKS = "tiktoken.model"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenization_kimi.py", "chat_template.jinja")


def collect(weights: CheckpointWeights, dtypes: set[np.dtype]) -> dict[str, bytes]:
    """Every file by its name. ``dtypes`` are those of the exported weights.

    Files that came with a converted checkpoint go out as they came. Raises ``UserError`` if a run's tokenizer is gone.
    """
    files = _kept(weights)
    before = read_config(paths.join(weights.where, HF_FOLDER)) if "config.json" in files else {}
    ids = {key: before[key] for key in TOKEN_IDS if before.get(key) is not None}
    files.setdefault("generation_config.json", _json({"_from_model_config": True, **ids}))
    files["config.json"] = _json(_config(weights, dtypes) | ids)
    return files


def _config(weights: CheckpointWeights, dtypes: set[np.dtype]) -> dict[str, Any]:
    is_fp8 = fp8.E4M3 in dtypes
    half = is_fp8 or np.dtype(ml_dtypes.bfloat16) in dtypes
    config = weights.cfg.replace(param_dtype="bfloat16" if half else "float32").to_hf()
    config["model_type"] = "deepseek_v3"  # as kimi_k2, transformers' own class would leave the experts out
    if is_fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(weights.block),
        }
    return config


def _kept(weights: CheckpointWeights) -> dict[str, bytes]:
    """From the folder of a converted checkpoint, or from beside the tokenizer that a run was trained with."""
    folder = paths.join(weights.where, HF_FOLDER)
    names = list(paths.sizes(folder))
    tokenizer = (weights.meta["config"].get("data") or {}).get("tokenizer")
    if names or tokenizer in (None, "bytes"):
        return {name: paths.read_bytes(paths.join(folder, name)) for name in names}
    ranks = Path(tokenizer).expanduser().absolute()
    ranks = ranks / RANKS if ranks.is_dir() else ranks
    if not ranks.exists():
        raise UserError(f"{weights.where} was trained with the tokenizer {ranks}, which is not here: put it there")
    beside = [name for name in TOKENIZER_FILES if ranks.name == RANKS and (ranks.parent / name).exists()]
    return {name: (ranks.parent / name).read_bytes() for name in beside} | {RANKS: ranks.read_bytes()}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
