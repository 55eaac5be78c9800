"""What a run that goes on does otherwise than before, of all that decides its model and its batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kimi_jax.pods.preflight import entries
from kimi_jax.training.config import TrainConfig

HOW = {"model.dtype", "model.remat", "model.experts", "data.cache", "data.tokenizer"}  # not what is computed


def changes(meta: Mapping[str, Any], cfg: TrainConfig, tokenizer: str) -> list[str]:
    """Each as "key old -> new", from the ``meta`` of a checkpoint; what an older one lacks is the same.

    ``tokenizer``: its identity, wherever it lies.
    """
    new = dict(_flat(json.loads(json.dumps(dataclasses.asdict(cfg))))) | {"tokenizer": tokenizer}
    old = dict(_flat(meta["config"])) | {"tokenizer": meta["data"].get("tokenizer", tokenizer)}
    return [f"{key} {old[key]} -> {new[key]}" for key in new if key in old and old[key] != new[key]]


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((key, config[key]) for key in ("seed", "batch_size", "seq_len") if key in config)
    for part in ("model", "data"):
        yield from ((key, value) for key, value in entries(part, config[part]) if key not in HOW)
