"""How close to its peak a chip comes on a large product, by the compiler's own model of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.ahead.hardware import PRODUCT
from kimi_jax.ahead.program import Program


def cycles(device: Any) -> int:
    """Of ``PRODUCT`` in bf16 on one device of a topology."""
    everywhere = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    rows, inner, columns = PRODUCT
    a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=everywhere) for s in ((rows, inner), (inner, columns)))
    program = Program.from_text(jax.jit(jnp.matmul).lower(a, b).compile().as_text() or "")
    return sum(i.cycles for i in program.computations[program.entry].values())
