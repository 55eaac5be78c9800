"""The bridge between declared parameters and Flax: one call turns ``specs(cfg)`` into a layer's parameters."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from kimi_jax.dims import Params, Specs, is_spec


def declare(module: nn.Module, specs: Specs, param_dtype: str) -> Params:
    """Creates every parameter of ``specs`` on ``module``, each under its own name.

    Buffers of the router stay in f32; all other leaves are stored in ``param_dtype``.
    """
    return {name: _declare(module, name, spec, param_dtype) for name, spec in specs.items()}


def _declare(module: nn.Module, name: str, spec, param_dtype: str):
    if is_spec(spec):
        return module.param(name, lambda key: spec.init(key, jnp.float32 if spec.is_buffer else param_dtype))
    group = _Group(spec, param_dtype, name=name)
    return group()


class _Group(nn.Module):
    """A nested dict of parameters."""

    specs: Specs
    param_dtype: str

    @nn.compact
    def __call__(self) -> Params:
        return declare(self, self.specs, self.param_dtype)
