"""What a Hugging Face config.json says beyond the model's shape: the part that is text, and how weights are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_jax.checkpoint import fp8, int4, paths
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError

_OF_EXTRA_LAYERS = re.compile(r"(model\.layers\.\d+\.)(?:eh_proj|enorm|hnorm|embed_tokens|shared_head)\.")


@dataclass(frozen=True)
class Quantisation:
    """How the source's quantised weights are stored, as its config.json says."""

    method: str | None  # "fp8", "int4" or None
    block: tuple[int, int] = fp8.BLOCK  # rows and columns that share a scale of fp8
    group: int = int4.GROUP  # columns that share a scale of int4


def read_config(folder: paths.AnyPath) -> dict[str, Any]:
    """config.json, or the text model's part of it together with the quantisation that may stand beside it."""
    config = paths.read_json(paths.join(folder, "config.json"))
    if not isinstance(config, dict):
        raise UserError("a Hugging Face config must be a JSON object")
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    return {"quantization_config": config.get("quantization_config"), **inner}


def quantisation_of(config: Mapping[str, Any]) -> Quantisation:
    """From ``quantization_config``: fp8 in blocks, or int4 in groups as compressed-tensors packs it."""
    found = config.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise UserError(f"config.json: quantization_config must be an object, not {found!r}")
    method = found.get("quant_method", "fp8")
    if method == "compressed-tensors":
        return Quantisation("int4", group=_group_size(found))
    block = found.get("weight_block_size") or fp8.BLOCK
    if method != "fp8":
        raise UserError(f"config.json: quant_method={method!r} is not supported (only 'fp8' in blocks)")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise UserError(f"config.json: weight_block_size={block!r} must be two positive numbers")
    return Quantisation("fp8" if found else None, (block[0], block[1]))


def _group_size(found: Mapping[str, Any]) -> int:
    """The group of symmetric int4 weights; whatever else compressed-tensors can say is refused."""
    if found.get("format") != "pack-quantized":
        raise UserError(f"config.json: compressed-tensors format {found.get('format')!r} is not supported")
    groups = found.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise UserError(f"config.json: config_groups must be an object, not {groups!r}")
    sizes = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise UserError(f"config.json: a group of config_groups must say how its weights are stored, not {group!r}")
        given = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "symmetric")}
        if given != {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}:
            raise UserError(f"config.json: weights quantised as {given} are not supported (only symmetric int4 groups)")
        sizes.append(weights.get("group_size"))
    if not sizes or any(not isinstance(n, int) or n < 1 or n != sizes[0] for n in sizes):
        raise UserError(f"config.json: compressed-tensors needs one group_size, found {sorted(set(map(str, sizes)))}")
    return sizes[0]


def extra_layers(config: Mapping[str, Any], cfg: ModelConfig, names: Iterable[str]) -> tuple[str, ...]:
    """Prefixes of the layers that predict further tokens, which are no part of the model.

    Each has parts that no other layer has (DeepSeek-V3, arXiv 2412.19437, section 2.2): a layer without them is one of
    the model's, whatever num_hidden_layers says.
    """
    n = config.get("num_nextn_predict_layers") or 0
    if not isinstance(n, int):
        raise UserError(f"config.json: num_nextn_predict_layers must be int, not {n!r}")
    prefixes = (f"model.layers.{cfg.num_hidden_layers + i}." for i in range(n))
    found = {match[1] for match in map(_OF_EXTRA_LAYERS.match, names) if match}
    return tuple(prefix for prefix in prefixes if prefix in found)
