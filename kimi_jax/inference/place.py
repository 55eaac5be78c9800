"""Where the engine's weights lie on a mesh: by the table ``SERVE``, padded with zeros to a whole number per device.

Zeros change nothing: a head, a hidden unit or an expert of zeros adds zero, and the padding of the vocabulary is cut
off after the head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Params, ParamSpec, Specs, is_spec, map_specs
from kimi_jax.inference.sharded import AXIS
from kimi_jax.model import specs
from kimi_jax.sharding.rules import SERVE, partition


def padded_specs(cfg: ModelConfig, n: int) -> Specs:
    """The declarations of the weights as ``n`` devices hold them."""

    def one(spec: ParamSpec) -> ParamSpec:
        i = next((spec.names.index(axis) for axis in SERVE if axis in spec.names), None)
        if i is None or spec.is_vector:
            return spec
        return dataclasses.replace(spec, shape=(*spec.shape[:i], -(-spec.shape[i] // n) * n, *spec.shape[i + 1 :]))

    return map_specs(one, specs(cfg))


def partitions(params: Params, cfg: ModelConfig, mesh: Mesh) -> Any:
    """A PartitionSpec for every array of weights as they are served, or of some of the model's parts; a scale for all
    of an axis is on all devices."""
    parts = padded_specs(cfg, mesh.shape[AXIS])

    def one(spec: ParamSpec, w: Any) -> Any:
        axes = partition(spec, mesh, SERVE)
        return jax.tree.map(
            lambda a: PartitionSpec(*(x if n > 1 else None for x, n in zip(axes, a.shape, strict=True))), w
        )

    return jax.tree.map(one, {name: parts[name] for name in params}, params, is_leaf=is_spec)
