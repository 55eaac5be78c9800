"""The weights of a block made whole where they are used, and their gradients brought back to where they lie.

Weights lie split over "fsdp", "context" and "expert". Left to itself the compiler may split the products instead, and
reduce activations; here it is told to gather the weights, in the dtype of the computation, and to scatter the sum of
their gradients, in the weights' own dtype. What "tensor" splits stays split.

XLA:TPU scatters only along the first axis in memory, and else reduces everything to everybody: so it is told that too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kimi_jax.dims import Array, Params, ParamSpec, Specs, is_spec
from kimi_jax.sharding.rules import TRAIN, partition

THEIR_USERS_DO = ("expert_mlp", "kv_lora")  # gather them: an axis of the weights of expert_parallel, parallel_attention


def gathered(mesh: Mesh | AbstractMesh) -> Callable[[Params, Specs, Any], Params]:
    """What takes the place of ``layers.block.as_they_are`` on ``mesh``."""

    def gather(p: Params, specs: Specs, dtype: Any) -> Params:
        def one(spec: ParamSpec, w: Array) -> Array:
            if len(spec.axes) < 2 or not set(THEIR_USERS_DO).isdisjoint(spec.axes):
                return w
            split = partition(spec, mesh, TRAIN)
            whole = PartitionSpec(*(axis if axis == "tensor" else None for axis in split))
            travel = w.dtype if "router" in spec.axes else dtype
            return _whole(NamedSharding(mesh, split), NamedSharding(mesh, whole), travel, w)

        return jax.tree.map(one, specs, p, is_leaf=is_spec)

    return gather


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _whole(split: NamedSharding, whole: NamedSharding, dtype: Any, w: Array) -> Array:
    """A product casts the result back to ``dtype``, for nothing; but its gradient comes in the dtype of w."""
    return lax.with_sharding_constraint(w.astype(dtype), whole).astype(w.dtype)


def _whole_forward(split: NamedSharding, whole: NamedSharding, dtype: Any, w: Array):
    return _whole(split, whole, dtype, w), None


def _whole_backward(split: NamedSharding, whole: NamedSharding, dtype: Any, _, dw: Array):
    scattered = [i for i, axes in enumerate(split.spec) if axes not in (None, "tensor")]
    dw = _with_first(dw, scattered[0]) if scattered else dw
    return (lax.with_sharding_constraint(dw, split),)


_whole.defvjp(_whole_forward, _whole_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def whole_weight(axes: tuple[str, ...], dtype: Any, w: Array) -> Array:
    """The same in ``shard_map``, for a weight that ``axes`` split along its first axis."""
    return lax.all_gather(w.astype(dtype), axes, tiled=True).astype(w.dtype)


def _whole_weight_forward(axes: tuple[str, ...], dtype: Any, w: Array):
    return whole_weight(axes, dtype, w), None


def _whole_weight_backward(axes: tuple[str, ...], dtype: Any, _, dw: Array):
    return (lax.psum_scatter(_with_first(dw, 0), axes, tiled=True),)


whole_weight.defvjp(_whole_weight_forward, _whole_weight_backward)


@dataclass(frozen=True)
class Pieces:
    """How a weight lies in ``shard_map`` along the model dimension: which axis that is, and what splits it."""

    axis: int
    over: tuple[str, ...]

    @classmethod
    def of(cls, spec: ParamSpec, split: PartitionSpec) -> Pieces:
        axis = spec.names.index("embed")
        over = split[axis] or ()
        return cls(axis, over if isinstance(over, tuple) else (over,))

    def together(self, w: Array) -> Array:
        return lax.all_gather(w, self.over, axis=self.axis, tiled=True) if self.over else w

    def scattered(self, dw: Array) -> Array:
        """The sum of everybody's; stacks of matrices are scattered as they lie."""
        if not self.over:
            return dw
        dw = _with_first(dw, self.axis) if dw.ndim == 2 else dw
        return lax.psum_scatter(dw, self.over, scatter_dimension=self.axis, tiled=True)


def _with_first(w: Array, i: int) -> Array:
    """The same array, with axis i the first in memory."""
    return with_layout_constraint(w, Layout((i, *(j for j in range(w.ndim) if j != i))))
