"""A training run on a mesh: where its state and its batches lie, and its step compiled for that place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.data.packing import Batch
from kimi_jax.errors import UserError
from kimi_jax.kernels.splash import splash_attention
from kimi_jax.layers import block
from kimi_jax.layers.attention import attention
from kimi_jax.layers.experts import BLOCKED, RAGGED
from kimi_jax.model import Ops, specs
from kimi_jax.sharding import copies
from kimi_jax.sharding.exchange import way_for
from kimi_jax.sharding.expert_parallel import expert_parallel
from kimi_jax.sharding.gathered import gathered
from kimi_jax.sharding.lookup import parallel_lookup
from kimi_jax.sharding.mesh import BATCH, make_mesh, tokens
from kimi_jax.sharding.parallel_attention import parallel_attention
from kimi_jax.sharding.parallel_newton_schulz import parallel_orthogonalised
from kimi_jax.sharding.rules import TRAIN, shardings
from kimi_jax.sharding.vocab_parallel import vocab_parallel
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.step import ON_ONE_DEVICE, Copies, StepOps, TrainState, init_state, train_step


@dataclass(frozen=True)
class Placement:
    mesh: Mesh
    state: Any  # a TrainState of shardings
    rows: NamedSharding  # of everything in a batch
    ops: StepOps

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def placement(cfg: TrainConfig, devices: Sequence[Any]) -> Placement:
    """``cfg.mesh`` over ``devices``: those of this program, or of a topology that a program is compiled for."""
    mesh = make_mesh(cfg.mesh, devices)
    rows = math.prod(mesh.shape[axis] for axis in BATCH)
    if (cfg.batch_size // cfg.accumulation) % rows:
        raise UserError(
            f"a microbatch of {cfg.batch_size // cfg.accumulation} sequences does not divide over {rows} devices, the "
            f"mesh's {' x '.join(BATCH)}: a batch_size that is a multiple of {rows * cfg.accumulation} would"
        )
    check_context(cfg)
    state = _state(cfg, mesh)
    alone = len(devices) == 1 and devices[0].platform == "cpu"
    ops = ON_ONE_DEVICE if alone else _spread(cfg, mesh, devices[0], state.params)
    return Placement(mesh, state, NamedSharding(mesh, tokens(mesh)), ops)


def check_context(cfg: TrainConfig) -> None:
    if cfg.seq_len % (n := cfg.mesh.context):
        raise UserError(f"seq_len {cfg.seq_len} does not divide over mesh.context = {n}: a multiple of {n} would")


def _spread(cfg: TrainConfig, mesh: Mesh, device: Any, params: Any) -> StepOps:
    copy, on_tpu = copies.inside(mesh), device.platform == "tpu"
    attend = parallel_attention(copy, splash_attention if on_tpu else attention)
    experts = expert_parallel(copy, way_for(device), RAGGED if on_tpu else BLOCKED, fp8=cfg.dispatch == "fp8")
    in_copy = jax.tree.map(lambda s: NamedSharding(copy, s.spec), params)
    several = Copies(partial(copies.run, mesh), copies.total, copies.largest)
    return StepOps(
        Ops(block.Ops(gathered(copy), attend, experts), parallel_lookup(copy)),
        vocab_parallel(copy),
        parallel_orthogonalised(mesh),
        partial(jax.lax.with_sharding_constraint, shardings=in_copy),
        several if mesh.shape["data"] > 1 else Copies(),
    )


def _state(cfg: TrainConfig, mesh: Mesh) -> Any:
    """The optimizer's moments lie where their parameters do, everything small everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params = shardings(specs(cfg.model), mesh, TRAIN)

    def like_params(moments: Any) -> Any:
        return jax.tree.map(lambda s, m: m if isinstance(m, optax.MaskedNode) else s, params, moments)

    opt = jax.eval_shape(partial(init_state, cfg)).opt_state
    moments = dict(momentum=like_params(opt.momentum), second=like_params(opt.second))
    place: Any = TrainState
    return place(replicated, params, opt._replace(count=replicated, ever_clipped=replicated, **moments))


def shapes(cfg: TrainConfig, place: Placement) -> tuple[TrainState, Batch]:
    """What a step takes, as shapes that know where they lie."""
    state = jax.tree.map(_placed, jax.eval_shape(partial(init_state, cfg)), place.state)
    ints, floats = (jax.ShapeDtypeStruct((cfg.batch_size, cfg.seq_len), dtype) for dtype in (np.int32, np.float32))
    return state, jax.tree.map(partial(_placed, sharding=place.rows), Batch(ints, ints, ints, ints, floats))


def lowered_step(cfg: TrainConfig, place: Placement):
    """``train_step`` lowered for ``place``; ``compile()`` gives what runs: (state, batch) -> (state, metrics)."""
    step = partial(train_step, cfg, ops=place.ops)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(place.state, place.replicated))
    return jitted.lower(*shapes(cfg, place))


def _placed(a: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
