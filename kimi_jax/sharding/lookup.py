"""Embedding rows from a table that no device holds whole.

The table [V, D] lies split over "fsdp", "context" and "expert" (or some of them) along D and over "tensor" along V.
Devices share their token ids, which are small; each looks up its slice of D for the tokens of all, and one exchange
gives every device the whole rows of its own tokens. Backward, the exchange runs the other way and every device adds up
the gradient of its slice, in f32. The tokens of one device are taken after those of another: adding up the rows of all
at once takes a sort of all, in a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kimi_jax.dims import VOCAB, Array
from kimi_jax.sharding.mesh import tokens
from kimi_jax.sharding.rules import TRAIN, split


def parallel_lookup(mesh: Mesh | AbstractMesh) -> Callable[[Array, Array, Any], Array]:
    """What takes the place of ``model.lookup`` on ``mesh``."""

    def lookup(table_VD: Array, tokens_BT: Array, dtype: Any) -> Array:
        over_D = split(table_VD.shape[1], TRAIN["embed"], mesh)
        table = PartitionSpec(TRAIN[VOCAB], over_D)

        def local(table_VD: Array, tokens_BT: Array) -> Array:
            everyones_JM = lax.all_gather(tokens_BT.reshape(-1), over_D)
            exact_VD = table_VD.astype(jnp.float32)  # its gradient has this dtype until all rows are added up
            rows_JMD = lax.map(lambda tokens_M: _rows(exact_VD, tokens_M).astype(dtype), everyones_JM)
            slices_JMD = lax.all_to_all(lax.psum(rows_JMD, "tensor"), over_D, 0, 0)
            return jnp.moveaxis(slices_JMD, 0, 1).reshape(*tokens_BT.shape, -1)

        spread = jax.shard_map(
            local, mesh=mesh, in_specs=(table, tokens(mesh)), out_specs=tokens(mesh), check_vma=False
        )
        return spread(table_VD, tokens_BT)

    return lookup


def _rows(table_VD: Array, tokens_M: Array) -> Array:
    """Rows of this device's part of the vocabulary, zeros for other tokens."""
    row_M = tokens_M - lax.axis_index("tensor") * table_VD.shape[0]
    here_M = (row_M >= 0) & (row_M < table_VD.shape[0])
    return jnp.where(here_M[:, None], table_VD[jnp.where(here_M, row_M, 0)], 0)
