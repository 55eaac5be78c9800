"""One optimizer step as a pure function: state and global batch in, state and metrics out.

    loss = (cross-entropy of all weighted tokens) / (their total weight) + alpha * balance loss

Gradients are summed over microbatches, loads too; attention maxima are maximised. On several devices the batch is
sharded, so each of these runs over all of them. Then: clip the norm, MuonClip, update the router's selection bias.
A non-finite loss or gradient leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kimi_jax.data.packing import Batch
from kimi_jax.dims import Array, Params, axes_of
from kimi_jax.layers.router import updated_bias
from kimi_jax.model import Ops, hidden_states, init_params, specs
from kimi_jax.optim import adamw, muon_clip, orthogonalised, warmup_stable_cosine
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.loss import cross_entropy


class StepOps(NamedTuple):
    """The computations of a step that a mesh does in ways of its own."""

    model: Ops = Ops()
    cross_entropy: Callable = cross_entropy
    orthogonalise: Callable = orthogonalised
    place: Callable = lambda params: params  # says that a tree like the parameters lies where they do


ON_ONE_DEVICE = StepOps()


class TrainState(NamedTuple):
    step: Array  # optimizer steps taken, int32
    params: Params
    opt_state: Any


class Metrics(NamedTuple):
    """What a step reports, all on the device until somebody reads it."""

    loss: Array  # cross-entropy per weighted token, nats
    balance_loss: Array  # unweighted
    grad_norm: Array
    update_rms: Array  # of all parameters together
    learning_rate: Array
    finite: Array  # whether the update was applied
    max_logits_LN: Array
    heads_ever_clipped: Array  # share of all heads that QK-Clip has touched so far
    load_LE: Array


class Sums(NamedTuple):
    """What is collected over microbatches."""

    loss: Array
    balance_loss: Array
    grads: Params
    load_LE: Array
    max_logits_LN: Array


def learning_rate(cfg: TrainConfig) -> Callable[[Array], Array]:
    schedule, peak = cfg.schedule, cfg.optimizer.learning_rate
    return warmup_stable_cosine(
        peak,
        warmup_steps=schedule.warmup_steps,
        stable_tokens=schedule.stable_tokens,
        decay_tokens=schedule.decay_tokens,
        final=peak * schedule.final_factor,
        tokens_per_step=cfg.tokens_per_step,
        anneal_tokens=schedule.anneal_tokens,
        anneal_final=peak * schedule.anneal_factor,
    )


def optimizer(cfg: TrainConfig, ops: StepOps = ON_ONE_DEVICE) -> optax.GradientTransformationExtraArgs:
    opt, axes = cfg.optimizer, axes_of(specs(cfg.model))
    adam: dict[str, Any] = dict(weight_decay=opt.weight_decay, tau=opt.tau, axes=axes, b1=opt.b1, b2=opt.b2)
    if opt.name == "adamw":
        return adamw(learning_rate(cfg), **adam)
    return muon_clip(
        learning_rate(cfg),
        momentum=opt.momentum,
        momentum_dtype=opt.momentum_dtype and jnp.dtype(opt.momentum_dtype),
        nesterov=opt.nesterov,
        ns_steps=opt.ns_steps,
        ns_dtype=jnp.dtype(opt.ns_dtype),
        split_fused=opt.split_fused,
        orthogonalise=ops.orthogonalise,
        **adam,
    )


def init_state(cfg: TrainConfig, given: Params | None = None) -> TrainState:
    """The state before the first step, from new weights or given ones; wrap in ``jax.jit`` or ``jax.eval_shape``."""
    params: Params = init_params(cfg.model, cfg.seed) if given is None else given
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(cfg).init(params))


def microbatch_sums(
    cfg: TrainConfig, params: Params, batch: Batch, total_weight: Array, ops: StepOps = ON_ONE_DEVICE
) -> Sums:
    """Loss, gradients and statistics of one microbatch, scaled so that their sums are the global batch's."""

    def loss(params: Params):
        x_BTD, stats = hidden_states(cfg.model, params, batch.tokens, batch.positions, batch.segment_ids, ops.model)
        nll = ops.cross_entropy(x_BTD, params["lm_head"], batch.targets, batch.weights) / total_weight
        balance = stats.balance_loss / cfg.accumulation
        return nll + cfg.balance_loss_weight * balance, (nll, balance, stats)

    grads, (nll, balance, stats) = jax.grad(loss, has_aux=True)(params)
    return Sums(nll, balance, ops.place(grads), stats.load_LE, stats.max_logits_LN)


def batch_sums(cfg: TrainConfig, params: Params, batch: Batch, ops: StepOps = ON_ONE_DEVICE) -> Sums:
    """``microbatch_sums`` over all microbatches of a global batch: sums, and the maximum of the logits."""
    total_weight = jnp.maximum(jnp.sum(batch.weights), 1.0)
    n = cfg.accumulation
    sums = partial(microbatch_sums, cfg, params, total_weight=total_weight, ops=ops)
    if n == 1:
        return sums(batch)
    micro = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Sums, part: Batch):
        new = sums(part)
        largest = jnp.maximum(total.max_logits_LN, new.max_logits_LN)
        return jax.tree.map(jnp.add, total, new)._replace(max_logits_LN=largest), None

    shapes = jax.eval_shape(lambda: sums(jax.tree.map(lambda a: a[0], micro)))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(add, zero._replace(max_logits_LN=jnp.full_like(zero.max_logits_LN, -jnp.inf)), micro)[0]


def train_step(
    cfg: TrainConfig, state: TrainState, batch: Batch, ops: StepOps = ON_ONE_DEVICE
) -> tuple[TrainState, Metrics]:
    sums = batch_sums(cfg, state.params, batch, ops)
    grad_norm = optax.tree.norm(sums.grads)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
    limit = cfg.optimizer.max_grad_norm
    scale = 1.0 if limit is None else jnp.minimum(1.0, limit / jnp.maximum(grad_norm, 1e-12))
    grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), sums.grads)
    old = state._replace(step=state.step + 1)

    def updated(grads: Params) -> tuple[TrainState, Array]:
        found = optimizer(cfg, ops).update(grads, state.opt_state, state.params, max_logits=sums.max_logits_LN)
        updates, opt_state = found
        params = _with_new_bias(optax.apply_updates(state.params, updates), sums.load_LE, cfg.bias_update_rate)
        n_params = sum(u.size for u in jax.tree.leaves(updates))
        return TrainState(old.step, params, opt_state), optax.tree.norm(updates) / n_params**0.5

    def kept(grads: Params) -> tuple[TrainState, Array]:
        return old, jnp.zeros(())

    state, update_rms = lax.cond(finite, updated, kept, grads)  # no copy of the state for the case that it is kept
    return state, Metrics(
        loss=sums.loss,
        balance_loss=sums.balance_loss,
        grad_norm=grad_norm,
        update_rms=update_rms,
        learning_rate=learning_rate(cfg)(old.step - 1),
        finite=finite,
        max_logits_LN=sums.max_logits_LN,
        heads_ever_clipped=jnp.mean(state.opt_state.ever_clipped),
        load_LE=sums.load_LE,
    )


def _with_new_bias(params: Params, load_LE: Array, rate: float) -> Params:
    if "moe_layers" not in params:
        return params
    moe = params["moe_layers"]["moe"]
    router = {**moe["router"], "bias": updated_bias(moe["router"]["bias"], load_LE, rate)}
    return {**params, "moe_layers": {**params["moe_layers"], "moe": {**moe, "router": router}}}


def eval_step(cfg: TrainConfig, params: Params, batch: Batch, ops: StepOps = ON_ONE_DEVICE) -> Array:
    """The summed cross-entropy of a batch, in nats."""
    x_BTD, _ = hidden_states(cfg.model, params, batch.tokens, batch.positions, batch.segment_ids, ops.model)
    return ops.cross_entropy(x_BTD, params["lm_head"], batch.targets, batch.weights)
