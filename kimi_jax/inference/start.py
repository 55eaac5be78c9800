"""A checkpoint on all devices of this run, ready for an engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kimi_jax.config import ModelConfig
from kimi_jax.data import tokenizer as tokenizers
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.dims import Params
from kimi_jax.errors import UserError
from kimi_jax.host_memory import keep_freed_memory
from kimi_jax.inference.sharded import serving_mesh
from kimi_jax.inference.weights import read_served
from kimi_jax.loading import config_of, load, tokenizer_of
from kimi_jax.model import in_compute_dtype


class Served(NamedTuple):
    tokenizer: Tokenizer
    cfg: ModelConfig
    params: Params
    mesh: Mesh | None  # of several devices

    @property
    def devices(self) -> int:
        return self.mesh.size if self.mesh else 1


def load_to_serve(
    path: str | Path, tokenizer: str | None = None, dtype: Any = None, weights: str | None = None
) -> Served:
    """``tokenizer``: None for the checkpoint's own. ``dtype``: of the computation, else as ``load`` has it, and bf16
    for weights in eight bits. ``weights``: fp8 or int8 on the devices, else in the dtype of the computation."""
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    spec = tokenizer or tokenizer_of(path)
    if spec is None:
        raise UserError(f"{path} names no tokenizer: give one with --tokenizer")
    try:
        text = tokenizers.load(spec)
    except UserError as error:
        if tokenizer:
            raise
        raise UserError(f"{error}; {path} names it: give another with --tokenizer") from error
    cfg = config_of(path, dtype or ("bfloat16" if weights else None))
    if text.vocab_size > cfg.vocab_size:
        raise UserError(f"the tokenizer has {text.vocab_size} ids, the model only {cfg.vocab_size}")
    mesh = serving_mesh(jax.devices()) if jax.device_count() > 1 else None
    if mesh is None and weights is None:
        _, params = load(path, dtype=dtype)
        return Served(text, cfg, jax.jit(partial(in_compute_dtype, cfg))(params), None)
    cfg, params = read_served(path, weights or "bf16", mesh, cfg.dtype)
    return Served(text, cfg, params, mesh)
