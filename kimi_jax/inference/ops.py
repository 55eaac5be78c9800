"""What a step of the engine does in ways of its own on a mesh; on one device, next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kimi_jax.layers.experts import fastest_experts_of
from kimi_jax.layers.linear import UNSPLIT, Split
from kimi_jax.model import head, lookup


def as_it_is(x: Any) -> Any:
    return x


class Ops(NamedTuple):
    """On a mesh every device has all rows [B, ...] of what layers compute, and holds the cache of its own rows alone.

    ``experts_of`` gets an expert index past the last for what goes to no expert.
    """

    lookup: Callable = lookup  # table, tokens_BT, dtype -> x_BTD
    own_rows: Callable = as_it_is  # [B, ...] -> the same of the rows that live here
    to_rows: Callable = as_it_is  # [B, T, N, X] of the heads that are here -> all heads of the own rows
    to_heads: Callable = as_it_is  # back
    all_heads: Callable = as_it_is  # weights [C, N, X] of the heads that are here -> of all
    split: Split = UNSPLIT
    experts_of: Callable = fastest_experts_of  # stack, layer, x_MD, weights_MK, experts_MK -> y_MD
    head: Callable = head  # params, x_BTD -> f32 logits, of a share of the rows
    share: Callable = as_it_is  # arrays [B, ...] -> the share of the rows whose logits are here
    gathered: Callable = lambda x, B: x  # back: of all B rows


ON_ONE_DEVICE = Ops()
