"""Kimi-K2 in JAX and Flax for TPU pods.

model, params = kimi_jax.load(path)
logits_BTV = model.apply({"params": params}, tokens_BT)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_jax.config import ModelConfig
    from kimi_jax.loading import load
    from kimi_jax.model import KimiK2

__all__ = ["KimiK2", "ModelConfig", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: ``import kimi_jax`` alone costs nothing."""
    import importlib

    modules = {"KimiK2": "kimi_jax.model", "ModelConfig": "kimi_jax.config", "load": "kimi_jax.loading"}
    if name not in modules:
        raise AttributeError(f"module 'kimi_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(modules[name]), name)
    globals()[name] = value
    return value
