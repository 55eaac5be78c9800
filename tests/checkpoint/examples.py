"""Small checkpoints of every kind for the tests of the converter, made without it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from kimi_jax import presets
from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.checkpoint.manager import Checkpoints
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.config import ModelConfig
from kimi_jax.dims import is_spec
from kimi_jax.model import specs

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
CFG = presets.tiny().replace(
    vocab_size=40, hidden_size=136, intermediate_size=20, moe_intermediate_size=130, n_routed_experts=4,
    num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=3, kv_lora_rank=10, q_lora_rank=14,
    qk_nope_head_dim=50, qk_rope_head_dim=4, v_head_dim=60, n_shared_experts=2,
)  # fmt: skip


def random_params(dtype=np.float32, cfg: ModelConfig = CFG):
    rng = np.random.default_rng(0)

    def draw(spec):
        return rng.standard_normal(spec.shape, np.float32).astype(np.float32 if spec.is_buffer else dtype)

    return jax.tree.map(draw, specs(cfg), is_leaf=is_spec)


def save_run(folder: Path, params, step: int = 5, tokenizer: str = "bytes") -> Path:
    """A workdir with one step of a run, in which there is an optimizer too."""
    saved = Checkpoints(folder / "checkpoints")
    meta = {"config": {"model": dataclasses.asdict(CFG), "data": {"tokenizer": tokenizer}}}
    saved.save(step, {"params": params, "momentum": {"norm": np.ones(3, np.float32)}, "step": np.int32(step)}, meta)
    saved.wait()
    saved.close()
    return folder


def random_tensors(cfg: ModelConfig = CFG) -> dict[str, np.ndarray]:
    return tensors_of(random_params(cfg=cfg), cfg)


def tensors_of(params, cfg: ModelConfig = CFG) -> dict[str, np.ndarray]:
    """Every tensor as Hugging Face has it: [out, in], by plain transposition of the stacked arrays."""
    found = {}
    for entry in plan(cfg):
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        part = leaf[entry.index]
        if entry.inputs:
            part = part.reshape(np.prod(part.shape[: entry.inputs]), -1).T
        found[entry.name] = np.ascontiguousarray(part)
    return found


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in safetensors.read(file).items()}


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def save_hf(folder: Path, tensors: dict[str, np.ndarray], cfg: ModelConfig = CFG, **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg.to_hf() | config))
    write_file(folder / "model.safetensors", tensors)
    return folder


def quantised(tensors: dict[str, np.ndarray], block: tuple[int, int] = (128, 128)) -> dict[str, np.ndarray]:
    """Projections as random fp8 with random scales for every block, the rest in bf16, the router's bias in f32."""
    rng = np.random.default_rng(1)
    found = {}
    for name, w in tensors.items():
        if "_proj" in name:
            found[name] = w.astype(FP8)
            shape = [-(-n // size) for n, size in zip(w.shape, block, strict=True)]
            found[name + "_scale_inv"] = rng.uniform(0.5, 2, shape).astype(np.float32)
        else:
            found[name] = w if name.endswith("bias") else w.astype(BF16)
    return found
