"""What is computed on TPU while rows travel between experts, in the order that the compiler's schedule has. Minutes.

At the default level alone: at O1 exchanges are not asynchronous.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax import presets
from kimi_jax.ahead.topology import topology_devices
from kimi_jax.dims import is_spec
from kimi_jax.layers.experts import RAGGED, specs
from kimi_jax.sharding.expert_parallel import TOKENS_AT_ONCE, expert_parallel
from kimi_jax.sharding.mesh import AXES, tokens
from kimi_jax.sharding.rules import TRAIN, partition

D, K, J = 1024, 4, 8
CFG = presets.tiny().replace(n_routed_experts=16, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=512)
LARGE = re.compile(r"(?:bf16|f8e4m3fn)\[\d+,[\d,]+\]")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def schedule() -> list[str]:
    """The program's text: two chunks of tokens on each of eight devices, forward and backward."""
    devices = np.asarray(topology_devices("v5p:2x2x2")).reshape(1, 1, J, 1, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 5)
    run = expert_parallel(mesh, "ragged", RAGGED, fp8=True)

    def step(p, x_BTD, weights_BTK, experts_BTK, dy_BTD):
        y_BTD, pullback = jax.vjp(lambda p, x, w: run(p, CFG, x, w, experts_BTK), p, x_BTD, weights_BTK)
        return y_BTD, pullback(dy_BTD)

    def weight(spec):
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=NamedSharding(mesh, partition(spec, mesh, TRAIN)))

    def rows(X, dtype):
        shape = (J, 2 * TOKENS_AT_ONCE, X)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*tokens(mesh), None)))

    p = jax.tree.map(weight, specs(CFG), is_leaf=is_spec)
    arguments = p, rows(D, jnp.bfloat16), rows(K, jnp.float32), rows(K, jnp.int32), rows(D, jnp.bfloat16)
    return jax.jit(step).lower(*arguments).compile().as_text().splitlines()


def journeys(schedule: list[str], backward: bool) -> list[tuple[int, int]]:
    """Of every exchange of values in turn: how many products of routed and of shared experts stand beside it."""
    found = []
    for i, line in enumerate(schedule):
        start = re.match(r"\s*(%\S+) = (.*?) ragged-all-to-all(-start)?\(", line)
        if not start or not LARGE.search(start[2]) or ("transpose" in line) is not backward:
            continue
        end = next(j for j in range(i, len(schedule)) if not start[3] or f"-done({start[1]})" in schedule[j])
        beside = schedule[i + 1 : end]
        routed = sum(bool(re.match(r"\s*%ragged-dot-none\S* = ", one)) for one in beside)
        shared = sum("dot_general" in one and "ragged" not in one for one in beside)
        found.append((routed, shared))
    return found


def test_forward_only_the_last_results_travel_alone(schedule):
    """Two chunks, three routed products each; what the shared expert does before its last product is part of that."""
    assert journeys(schedule, backward=False) == [(0, 1), (3, 0), (3, 0), (0, 0)]


def test_backward_all_travel_beside_products(schedule):
    """Rows beside gradients of the shared expert, results beside those of the routed experts' weights."""
    assert journeys(schedule, backward=True) == [(0, 5), (3, 0)]
