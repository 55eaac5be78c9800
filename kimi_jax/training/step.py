"""One optimizer step as a pure function: state and global batch in, state and metrics out.

    loss = (cross-entropy of all weighted tokens) / (their total weight) + alpha * balance loss

Gradients are summed over microbatches, loads too; attention maxima are maximised. On several devices the batch is
sharded, so each of these runs over all of them; copies of the model (``Copies``) add up their own first. Then: clip
the norm, MuonClip, update the router's selection bias.
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


class Copies(NamedTuple):
    """Copies of the model, each with its own part of the batch. Here: the only one."""

    run: Callable = lambda f, params, batch, whole: f(params, batch, whole)  # f in every copy; whole: the same in all
    total: Callable = lambda x: x  # in f: the sum over copies
    largest: Callable = lambda x: x


class StepOps(NamedTuple):
    """The computations of a step that a mesh does in ways of its own."""

    model: Ops = Ops()
    cross_entropy: Callable = cross_entropy
    orthogonalise: Callable = orthogonalised
    place: Callable = lambda params: params  # says that a tree like the parameters lies where they do
    copies: Copies = Copies()


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
    skipped: Array  # steps so far whose update was not
    max_logits_LN: Array
    heads_ever_clipped: Array  # share of all heads that QK-Clip has touched so far
    load_LE: Array


class Whole(NamedTuple):
    """Of a global batch, by which its parts are divided."""

    weight: Array
    sequences: Array  # that are not empty

    @classmethod
    def of(cls, batch: Batch) -> Whole:
        total = jnp.sum(batch.weights)
        return cls(jnp.where(total > 0, total, 1.0), jnp.maximum(_sequences(batch), 1.0))


class Sums(NamedTuple):
    """What is collected over microbatches and copies."""

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


def microbatch_sums(cfg: TrainConfig, params: Params, batch: Batch, whole: Whole, ops: StepOps = ON_ONE_DEVICE) -> Sums:
    """Loss, gradients and statistics of one microbatch, scaled so that their sums are the global batch's."""
    share = _sequences(batch) / whole.sequences

    def loss(params: Params):
        x_BTD, stats = hidden_states(cfg.model, params, batch.tokens, batch.positions, batch.segment_ids, ops.model)
        nll = ops.cross_entropy(x_BTD, params["lm_head"], batch.targets, batch.weights) / whole.weight
        balance = stats.balance_loss * share
        return nll + cfg.balance_loss_weight * balance, (nll, balance, stats)

    grads, (nll, balance, stats) = jax.grad(loss, has_aux=True)(params)
    return Sums(nll, balance, ops.place(grads), stats.load_LE, stats.max_logits_LN)


def _sequences(batch: Batch) -> Array:
    return jnp.sum(jnp.any(batch.segment_ids > 0, axis=1), dtype=jnp.float32)


def batch_sums(cfg: TrainConfig, params: Params, batch: Batch, ops: StepOps = ON_ONE_DEVICE) -> Sums:
    """``microbatch_sums`` over a global batch: sums, and the maximum of the logits. Copies meet once, at the end."""

    def of_a_copy(params: Params, batch: Batch, whole: Whole) -> Sums:
        sums = _copy_sums(cfg, params, batch, whole, ops)
        added = jax.tree.map(ops.copies.total, sums)
        return added._replace(max_logits_LN=ops.copies.largest(sums.max_logits_LN))

    return ops.copies.run(of_a_copy, params, batch, Whole.of(batch))


def _copy_sums(cfg: TrainConfig, params: Params, batch: Batch, whole: Whole, ops: StepOps) -> Sums:
    """Over the microbatches of one copy of the model."""
    n = cfg.accumulation
    sums = partial(microbatch_sums, cfg, params, whole=whole, ops=ops)
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
    grad_norm = _norm(sums.grads)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
    limit = cfg.optimizer.max_grad_norm
    scale = 1.0 if limit is None else jnp.minimum(1.0, limit / jnp.maximum(grad_norm, 1e-12))
    grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), sums.grads)
    old, taken = state._replace(step=state.step + 1), state.opt_state.count

    def updated(grads: Params) -> tuple[TrainState, Array]:
        found = optimizer(cfg, ops).update(grads, state.opt_state, state.params, max_logits=sums.max_logits_LN)
        updates, opt_state = found
        params = _with_new_bias(optax.apply_updates(state.params, updates), sums.load_LE, cfg.bias_update_rate)
        n_params = sum(u.size for u in jax.tree.leaves(updates))
        return TrainState(old.step, params, opt_state), _norm(updates) / n_params**0.5

    def kept(grads: Params) -> tuple[TrainState, Array]:
        return old, jnp.zeros(())

    state, update_rms = lax.cond(finite, updated, kept, grads)  # no copy of the state for the case that it is kept
    return state, Metrics(
        loss=sums.loss,
        balance_loss=sums.balance_loss,
        grad_norm=grad_norm,
        update_rms=update_rms,
        learning_rate=learning_rate(cfg)(taken),  # skipped steps do not count
        finite=finite,
        skipped=state.step - state.opt_state.count,
        max_logits_LN=sums.max_logits_LN,
        heads_ever_clipped=jnp.mean(state.opt_state.ever_clipped),
        load_LE=sums.load_LE,
    )


def _norm(tree: Params) -> Array:
    """Of all leaves together, summed in f32."""
    return optax.tree.norm(optax.tree.cast(tree, jnp.float32))


def _with_new_bias(params: Params, load_LE: Array, rate: float) -> Params:
    if "moe_layers" not in params:
        return params
    moe = params["moe_layers"]["moe"]
    router = {**moe["router"], "bias": updated_bias(moe["router"]["bias"], load_LE, rate)}
    return {**params, "moe_layers": {**params["moe_layers"], "moe": {**moe, "router": router}}}


def eval_step(cfg: TrainConfig, params: Params, batch: Batch, ops: StepOps = ON_ONE_DEVICE) -> Array:
    """The summed cross-entropy of a batch, in nats."""

    def of_a_copy(params: Params, batch: Batch, _) -> Array:
        x_BTD, _ = hidden_states(cfg.model, params, batch.tokens, batch.positions, batch.segment_ids, ops.model)
        return ops.copies.total(ops.cross_entropy(x_BTD, params["lm_head"], batch.targets, batch.weights))

    return ops.copies.run(of_a_copy, params, batch, None)
