"""The dimension legend and the parameter declaration that everything else is derived from.

Array names carry their dimensions as a suffix: ``q_BTNH`` is [batch, query positions, heads, per-head dim].

=====  ==============================================  =====  =============================================
``B``  batch                                           ``Q``  rank of the query latent
``T``  query positions                                 ``C``  rank of the key/value latent
``S``  key positions                                   ``E``  routed experts
``M``  tokens, flat (B*T)                              ``K``  experts per token
``D``  model width                                     ``A``  assignments (M*K)
``N``  heads                                           ``F``  feed-forward width
``H``  per-head dim without rotation                   ``V``  vocabulary
``R``  per-head rotary dim                             ``L``  layers
``W``  per-head value dim                              ``P``  pages, ``G`` slots of a page
=====  ==============================================  =====  =============================================

A parameter's shape, logical axes and initial scale are declared once, in the ``specs(cfg)`` of the layer that owns
it. Initialisation, sharding, Muon's matrix axes, QK-Clip, Hugging Face names and all counts read that declaration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # a nested dict of arrays
Specs = Any  # a nested dict of ParamSpec


@dataclass(frozen=True)
class Fused:
    """A logical axis that holds several named parts side by side, such as [nope | rope]."""

    parts: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def name(self) -> str:
        return "+".join(name for name, _ in self.parts)


Axis = str | Fused
Axes = tuple[Axis, ...]

LAYERS = "layers"  # stacks one matrix per layer
EXPERTS = "experts"  # stacks one matrix per expert
HEADS = "heads"  # forms one side of a matrix together with the axis that follows it
VOCAB = "vocab"  # embedding and head: not a hidden matrix
BUFFER = "router_bias"  # not trained by gradients: no optimizer may touch it


@dataclass(frozen=True)
class ParamSpec:
    """Declares one parameter: ``shape`` and logical ``axes`` (one name per dimension), and how it starts.

    ``std`` is the standard deviation of a truncated normal; ``None`` means the constant ``fill``.
    """

    shape: tuple[int, ...]
    axes: Axes
    std: float | None = None
    fill: float = 0.0

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), self

    def init(self, key: Array, dtype=jnp.float32) -> Array:
        if self.std is None:
            return jnp.full(self.shape, self.fill, dtype)
        draw = jax.random.truncated_normal(key, -3.0, 3.0, self.shape, jnp.float32)
        return (self.std * draw).astype(dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the axes; a fused one has those of its parts, joined by +."""
        return tuple(axis.name if isinstance(axis, Fused) else axis for axis in self.axes)

    @property
    def is_buffer(self) -> bool:
        return BUFFER in self.axes

    @property
    def is_vector(self) -> bool:
        return sum(axis not in (LAYERS, EXPERTS) for axis in self.axes) < 2

    def stacked(self, n_layers: int) -> ParamSpec:
        """The same parameter for ``n_layers`` layers, stacked on a leading axis."""
        return ParamSpec((n_layers, *self.shape), (LAYERS, *self.axes), self.std, self.fill)


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(a, (str, Fused)) for a in x)


def map_specs(f, specs: Specs):
    """Applies ``f`` to every ParamSpec of a nested dict."""
    return jax.tree.map(f, specs, is_leaf=is_spec)


def by_name(specs: Specs, above: str = "") -> Iterator[tuple[str, ParamSpec]]:
    """Every ParamSpec of a nested dict after its dotted path, in the order of declaration."""
    for name, node in specs.items():
        if is_spec(node):
            yield above + name, node
        else:
            yield from by_name(node, f"{above}{name}.")


def axes_of(specs: Specs):
    """The logical axes of every parameter, in the structure of the parameters."""
    return map_specs(lambda spec: spec.axes, specs)
