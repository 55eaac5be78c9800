"""A step's memory and time by arithmetic alone, in milliseconds: what a sweep prunes by before it compiles anything.

Memory of a device, in bytes, for M tokens of a microbatch on it:

    state       its part of the parameters and of the optimizer's moments
    gradients   as the parameters, twice with accumulation; and the largest parameter, or the piece of a stack of
                experts that is updated at once, twice in f32, for Newton-Schulz
    kept        M x what the blocks' backward passes need (traced from the model, for the remat policy at hand)
    one block   M x what one block needs without any remat, its experts' weights gathered, their gradients, and the rows
                of an exchange: 6 buffers of 1.25 M K rows of D

Time: model FLOPs, a third more with remat, at the efficiency of products; and on the links, of every MoE layer and
microbatch, 5 exchanges of 1.25 M K rows (7 with remat), two gathers of the weights and one reduction of their gradients
in f32; and once a step Newton-Schulz's matrices there and back; what is offloaded, to the host and back. The rest of
``roofline`` is left out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kimi_jax.ahead.collectives import Collective
from kimi_jax.ahead.hardware import CHIPS, GIB, of_kind
from kimi_jax.ahead.roofline import traffic
from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, is_spec
from kimi_jax.flops import PEAK_BF16, training_flops_per_token
from kimi_jax.model import hidden_states, init_params, specs
from kimi_jax.optim.muon import PIECES
from kimi_jax.sharding.mesh import BATCH, MeshConfig
from kimi_jax.sharding.rules import TRAIN, partition
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.step import init_state

ROWS = 1.25  # of an exchange's buffer, over those of a balanced routing
COMPUTE_BYTES, F32_BYTES = 2, 4


@dataclass(frozen=True)
class Estimate:
    gib: float
    seconds: float  # per step, nothing overlapped
    seconds_per_token: float


def estimate(cfg: TrainConfig, mesh: Mesh) -> Estimate:
    """Of ``cfg`` on ``mesh``; raises ``UserError`` where a parameter does not divide."""
    tokens = microbatch_tokens(cfg, mesh)
    seconds = _compute_seconds(cfg, mesh) + _link_seconds(cfg, mesh, tokens) + _host_seconds(cfg, mesh, tokens)
    return Estimate(_bytes(cfg, mesh, tokens) / GIB, seconds, seconds / cfg.tokens_per_step)


def state_gib(cfg: TrainConfig, mesh: Mesh) -> float:
    """Parameters, moments and gradients alone: the least that a device holds, whatever the batch."""
    held = _held(cfg.model, mesh, True) + _held(cfg.model, mesh, False)
    return sum(held) * jnp.dtype(cfg.model.param_dtype).itemsize * (2 + _moments_per_parameter(cfg)) / GIB


def microbatch_tokens(cfg: TrainConfig, mesh: Mesh) -> float:
    """On one device, of one microbatch."""
    spread = math.prod(mesh.shape[axis] for axis in (*BATCH, "context"))
    return cfg.tokens_per_step / cfg.accumulation / spread


def _held(cfg: ModelConfig, mesh: Mesh, experts: bool) -> list[float]:
    """Elements of every parameter on one device: the experts', or all others'."""
    found = []
    for spec in jax.tree.leaves(specs(cfg), is_leaf=is_spec):
        if (EXPERTS in spec.axes) == experts:
            split = [axis for axes in partition(spec, mesh, TRAIN) if axes for axis in np.atleast_1d(axes)]
            found.append(math.prod(spec.shape) / math.prod(mesh.shape[axis] for axis in split))
    return found


def _bytes(cfg: TrainConfig, mesh: Mesh, tokens: float) -> float:
    model = cfg.model
    experts, others = _held(model, mesh, True), _held(model, mesh, False)
    held, updated = experts + others, max([n / PIECES for n in experts] + others)
    width = jnp.dtype(model.param_dtype).itemsize
    state = sum(held) * width * (1 + _moments_per_parameter(cfg))
    gradients = sum(held) * width * (2 if cfg.accumulation > 1 else 1) + 2 * updated * F32_BYTES
    kept = tokens * kept_bytes(model, cfg.seq_len)
    block = tokens * kept_bytes(_one_block(model), cfg.seq_len)
    return state + gradients + kept + block + _expert_workspace(model, mesh, tokens)


def _expert_workspace(model: ModelConfig, mesh: Mesh, tokens: float) -> float:
    local = 3 * model.hidden_size * model.moe_intermediate_size * model.n_routed_experts
    weights = local / mesh.shape["expert"] / mesh.shape["tensor"] * (COMPUTE_BYTES + F32_BYTES)
    return weights + 6 * _exchanged_bytes(model, tokens) if model.n_moe_layers else 0.0


def _exchanged_bytes(model: ModelConfig, tokens: float) -> float:
    return ROWS * tokens * model.num_experts_per_tok * model.hidden_size * COMPUTE_BYTES


def _moments_per_parameter(cfg: TrainConfig) -> float:
    """Bytes of the optimizer's state for every byte of parameters."""
    model = cfg.model.replace(remat="none")
    return _moments(dataclasses.replace(cfg, model=model, mesh=MeshConfig(), batch_size=1, accumulation=1))


@lru_cache
def _moments(cfg: TrainConfig) -> float:
    state = jax.eval_shape(lambda: init_state(cfg))
    sizes = [sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(part)) for part in (state.opt_state, state.params)]
    return sizes[0] / sizes[1]


def kept_bytes(model: ModelConfig, seq_len: int, on_host: bool = False) -> float:
    """Per token, what the backward pass of all blocks needs beside the parameters, under the model's remat policy.

    On the device, or in the host's memory.
    """
    if not model.n_moe_layers:
        return _residuals(model, seq_len)[on_host]
    shallow = [model.replace(num_hidden_layers=model.first_k_dense_replace + n) for n in (1, 2)]
    one, two = (_residuals(few, seq_len)[on_host] for few in shallow)
    return one + (two - one) * (model.n_moe_layers - 1)


def _one_block(model: ModelConfig) -> ModelConfig:
    """The last kind of block alone, without remat."""
    return model.replace(num_hidden_layers=1, first_k_dense_replace=0 if model.n_moe_layers else 1, remat="none")


@lru_cache
def _residuals(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Bytes per token that ``jax.vjp`` of the blocks returns, on the device and on the host; nothing is computed.

    What has the shape of a weight is taken for one.
    """
    params = jax.eval_shape(lambda: init_params(model, 0))
    weights = {a.shape for a in jax.tree.leaves(params)}
    ints = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)

    def pullback(params: Any, tokens: Any) -> Any:
        return jax.vjp(lambda p: hidden_states(model, p, tokens, tokens, tokens), params)[1]

    found: Any = jax.make_jaxpr(pullback)(params, ints).out_avals
    total = [0.0, 0.0]
    for a in (a for a in found if a.shape not in weights):
        total["Host" in str(a.memory_space)] += a.size * a.dtype.itemsize / seq_len
    return total[0], total[1]


def _compute_seconds(cfg: TrainConfig, mesh: Mesh) -> float:
    kind = mesh.devices.flat[0].device_kind
    flops = training_flops_per_token(cfg.model, cfg.seq_len) * cfg.tokens_per_step / mesh.size
    again = 1 if cfg.model.remat == "none" else 4 / 3
    return flops * again / (of_kind(PEAK_BF16, kind) * of_kind(CHIPS, kind).matmul_efficiency)


def _host_seconds(cfg: TrainConfig, mesh: Mesh, tokens: float) -> float:
    chip = of_kind(CHIPS, mesh.devices.flat[0].device_kind)
    there_and_back = 2 * cfg.accumulation * tokens * kept_bytes(cfg.model, cfg.seq_len, on_host=True)
    return there_and_back * chip.devices / chip.host_bytes_per_s


def _link_seconds(cfg: TrainConfig, mesh: Mesh, tokens: float) -> float:
    model, times = cfg.model, cfg.accumulation
    experts = sum(_held(model, mesh, True)) * mesh.shape["fsdp"]
    others = sum(_held(model, mesh, False)) * mesh.shape["fsdp"] * mesh.shape["expert"]
    exchanges = (5 if model.remat == "none" else 7) * model.n_moe_layers * times
    per_weight = times * (2 * COMPUTE_BYTES + F32_BYTES)
    moved = [
        _along(mesh, "all-to-all", ("expert",), exchanges * _exchanged_bytes(model, tokens)),
        _along(mesh, "all-gather", ("fsdp",), experts * per_weight),
        _along(mesh, "all-gather", ("fsdp", "expert"), others * per_weight),
        _along(mesh, "all-to-all", ("fsdp", "expert"), 2 * F32_BYTES * sum(_held(model, mesh, True))),
        _along(mesh, "all-gather", ("tensor",), 8 * times * model.num_hidden_layers * tokens * model.hidden_size * 2),
    ]
    return sum(row.seconds for row in traffic(moved, list(mesh.devices.flat)))


def _along(mesh: Mesh, kind: str, axes: tuple[str, ...], bytes_: float) -> Collective:
    """``bytes_`` of result, or of operand, from every device of the group that holds the first."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.arange(mesh.size).reshape(mesh.devices.shape)[index].ravel()
    return Collective(kind, axes, tuple(group.tolist()), (), bytes_ * (1 - 1 / group.size), 1.0, "")
