"""What travels to the experts: rows of one array or several, side by side, and a few numbers of each row with them.

One long journey costs less than several. Values travel as they are, or in eight bits (``fp8_rows``) with their scales.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array
from kimi_jax.sharding.exchange import Journey
from kimi_jax.sharding.fp8_rows import Fp8Rows, compressed, restored


class Parcel(NamedTuple):
    value_AX: Array
    few_At: Array  # f32: the scales of each array, then whatever else
    n: int  # arrays
    dtype: Any  # of the arrays

    def rows(self, which_A: Array, few_At: Array | None = None) -> Parcel:
        """Some of the rows, as often as wanted, and numbers that go with them."""
        few = [self.few_At[which_A]] if few_At is None else [self.few_At[which_A], few_At]
        return self._replace(value_AX=self.value_AX[which_A], few_At=jnp.concatenate(few, axis=1))

    def arrived(self, journey: Journey, e: int, at_once: AbstractContextManager) -> tuple[list[Array], Array]:
        """The arrays at the e experts of a device, and what else came with the rows; zeros where no row came.

        The few numbers travel first, the others in the context ``at_once``.
        """
        real_R1 = journey.experts_R[:, None] < e
        few_Rt = journey.there(self.few_At) if self.few_At.shape[1] else jnp.zeros((len(real_R1), 0))
        value_AX, few_Rt = lax.optimization_barrier((self.value_AX, few_Rt))
        t = few_Rt.shape[1] // self.n
        *scales, few_Rt = jnp.split(few_Rt, [t * (i + 1) for i in range(self.n)], axis=1)
        with at_once:
            value_RX = journey.there(value_AX)
        values = jnp.split(value_RX, self.n, axis=1)
        if value_AX.dtype != self.dtype:
            values = [restored(Fp8Rows(*rows), self.dtype) for rows in zip(values, scales, strict=True)]
        return [jnp.where(real_R1, x_RD, 0) for x_RD in values], jnp.where(real_R1, few_Rt, 0)


def packed(fp8: bool, *arrays_MD: Array) -> Parcel:
    """A row for each token, ``fp8``: in eight bits."""
    rows = [compressed(x_MD) if fp8 else Fp8Rows(x_MD, jnp.zeros((len(x_MD), 0))) for x_MD in arrays_MD]
    value_MX, few_Mt = (jnp.concatenate(columns, axis=1) for columns in zip(*rows, strict=True))
    return Parcel(value_MX, few_Mt, len(arrays_MD), arrays_MD[0].dtype)
