"""Our parameters and the tensors of a Hugging Face checkpoint: one table, read in both directions.

Hugging Face stores one [out, in] matrix per layer and expert; we store [in, out] with heads on an axis of their own,
stacked over layers and experts. A row of TABLE names both; ``plan`` expands it for a config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, HEADS, LAYERS, ParamSpec, by_name
from kimi_jax.model import specs

Path = tuple[str, ...]
T = TypeVar("T")

_ATTENTION = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attn.q": "self_attn.q_proj.weight",
    "attn.q_a": "self_attn.q_a_proj.weight",
    "attn.q_norm": "self_attn.q_a_layernorm.weight",
    "attn.q_b": "self_attn.q_b_proj.weight",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attn.kv_b": "self_attn.kv_b_proj.weight",
    "attn.o": "self_attn.o_proj.weight",
}
_DENSE = {f"mlp.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_MOE = {
    "moe.router.weight": "mlp.gate.weight",
    "moe.router.bias": "mlp.gate.e_score_correction_bias",
    **{f"moe.experts.{name}": f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"moe.shared.{name}": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
}

TABLE: dict[str, str] = {  # path of our parameter -> name of the Hugging Face tensor(s)
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    **{f"dense_layers.{ours}": f"model.layers.{{layer}}.{hf}" for ours, hf in (_ATTENTION | _DENSE).items()},
    **{f"moe_layers.{ours}": f"model.layers.{{layer}}.{hf}" for ours, hf in (_ATTENTION | _MOE).items()},
}

SCALE_SUFFIX = "_scale_inv"  # of the block scales of an fp8 weight
STRAY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # not parameters, in released shards

TEXT_PREFIX = "language_model."  # of the text model's tensors in a model that also sees
OTHER_PARTS = ("vision_tower.", "mm_projector.", "multi_modal_projector.")


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor: its name and shape, and the slice ``index`` of the parameter ``path`` that it holds."""

    name: str
    shape: tuple[int, ...]
    path: Path
    index: tuple[int, ...]
    ours: tuple[int, ...]  # shape of that slice
    inputs: int  # how many leading axes of the slice are the matrix's input side; 0 for a vector or the embedding

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as a slice of our parameter: a view where numpy allows."""
        return tensor.T.reshape(self.ours) if self.inputs else tensor.reshape(self.ours)

    def to_hf(self, part: np.ndarray) -> np.ndarray:
        """A slice of our parameter as the Hugging Face tensor."""
        return part.reshape(self.shape[::-1]).T if self.inputs else part.reshape(self.shape)


def plan(cfg: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the model's Hugging Face checkpoint, without fp8 scales."""
    for name, spec in by_name(specs(cfg)):
        yield from _entries(cfg, name, spec)


def text_part(tensors: Mapping[str, T]) -> dict[str, T]:
    """What belongs to the text model, by names without their prefix; those that see are no part of it."""
    if not any(name.startswith(TEXT_PREFIX) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(TEXT_PREFIX): t for name, t in tensors.items() if not name.startswith(OTHER_PARTS)}


def _entries(cfg: ModelConfig, name: str, spec: ParamSpec) -> Iterator[Entry]:
    path, template = tuple(name.split(".")), TABLE[name]
    n_stacks = sum(axis in (LAYERS, EXPERTS) for axis in spec.axes)
    ours, axes = spec.shape[n_stacks:], spec.axes[n_stacks:]
    inputs = 0 if len(ours) == 1 or path == ("embedding",) else 2 if axes[0] == HEADS else 1
    shape = (math.prod(ours[inputs:]), math.prod(ours[:inputs])) if inputs else ours
    first_layer = cfg.first_k_dense_replace if path[0] == "moe_layers" else 0
    for index in np.ndindex(spec.shape[:n_stacks]):
        names = dict(zip(("layer", "expert"), index, strict=False))
        if names:
            names["layer"] += first_layer
        yield Entry(template.format(**names), shape, path, index, ours, inputs)
