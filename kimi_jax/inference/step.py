"""A ``StepPlan`` on the device: one array up and one step's tokens down.

The host's part of a step is bound by the number of arrays it hands over, so what every step has goes up as one int32
array, with the bits of what is not int32. Steps run in order, and each takes the cache and the tokens that the one
before leaves on the device: nothing has to come to the host before the next step can start.

A step is several programs, for what one of them is compiled for, the others need not know: ``compute`` runs the layers,
compiled once per shape of rows; ``choose``, which is small, the sampler, once per set of what rows ask of it; and
``score`` gives prompts their log probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.inference import cache
from kimi_jax.inference.forward import after, forward
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.ops import ON_ONE_DEVICE, Ops
from kimi_jax.inference.place import partitions
from kimi_jax.inference.plan import StepPlan, StepResult
from kimi_jax.inference.sampling import Extras, Sampled, Sampling, sample
from kimi_jax.inference.sharded import AXIS, sharded_ops

INTS = ("start_B", "length_B", "feed_B", "drafted_B", "top_k_B")
BITS = ("seed_B", "temperature_B", "top_p_B", "min_p_B", "repetition_B", "presence_B", "frequency_B")
ROWS = 256  # of logits at a time, where all tokens of a prompt are scored


class State(NamedTuple):
    """What stays on the device between steps."""

    cache_LPGX: Array
    tokens_R: Array  # int32: the first token that each row of the last step sampled


def init_state(cfg: ModelConfig, limits: Limits, dtype: str | None = None, mesh: Mesh | None = None) -> State:
    lanes = 1 if jax.default_backend() == "cpu" else 128

    def empty() -> State:
        cache_LPGX = cache.init(cfg, limits.shards * limits.n_pages, limits.page_size, lanes, dtype)
        return State(cache_LPGX, jnp.zeros(limits.max_rows, jnp.int32))

    where = mesh and jax.tree.map(lambda spec: NamedSharding(mesh, spec), STATE)
    return jax.jit(empty, out_shardings=where)()


WHOLE_ARRAY = PartitionSpec()
STATE = State(PartitionSpec(None, AXIS), WHOLE_ARRAY)  # pyright: ignore[reportArgumentType]  # on a mesh


class Given(NamedTuple):
    """The arrays of a plan."""

    flat_BI: Any
    rows_Sb: Any
    extras: Extras
    next_BT: Any


class Shape(NamedTuple):
    """What programs are compiled for, besides the shapes of arrays."""

    T: int
    J: int
    n_logprobs: int


class Computed(NamedTuple):
    """What the layers leave for the sampler."""

    x_BJD: Array  # normed hidden states, after each of which a token is sampled
    drafts_BJ: Array
    columns_BI: Array  # those of ``flat`` before the tokens


class Running(NamedTuple):
    """The result of a step, as soon as it is there."""

    sampled: Sampled
    scored: Any  # as ``_scores``, or None


def run(
    params: Params, cfg: ModelConfig, state: State, plan: StepPlan, mesh: Mesh | None = None
) -> tuple[Running, State]:
    """Starts a step and returns at once; ``state`` is used up. The result is on its way to the host.

    On a mesh (``sharded.serving_mesh``), the weights lie as ``place.partitions`` says.
    """
    extras = Extras(plan.seen_BU, plan.times_BU, plan.biased_BU, plan.bias_BU, plan.grammar_BJw)  # pyright: ignore[reportArgumentType]
    given = Given(flat(plan), plan.rows_Sb, extras, plan.next_BT)
    shape = Shape(plan.tokens_BT.shape[1], plan.n_sampled, plan.n_logprobs)
    running, state = _step(params, state, given, cfg, mesh, shape)
    for array in jax.tree.leaves(running):
        array.copy_to_host_async()
    return running, state


def fetch(running: Running) -> StepResult:
    """Waits for the step."""
    sampled, scored = jax.device_get(running)
    return StepResult(*sampled, *(scored or ()))


def flat(plan: StepPlan) -> np.ndarray:
    """int32 [B, 12 + T + P]."""
    columns = [getattr(plan, name).view(np.int32)[:, None] for name in (*INTS, *BITS)]
    return np.concatenate([*columns, plan.tokens_BT, plan.pages_BP], axis=1)


def columns(T: int, P: int) -> int:
    """Of ``flat``, for rows of T tokens and page tables of P."""
    return len(INTS) + len(BITS) + T + P


@partial(jax.jit, static_argnames=("cfg", "mesh", "shape"), donate_argnames="state")
def step(
    params: Params, state: State, given: Given, cfg: ModelConfig, mesh: Mesh | None, shape: Shape
) -> tuple[Running, State]:
    """Both halves as one program."""
    return _step(params, state, given, cfg, mesh, shape)


def _step(
    params: Params, state: State, given: Given, cfg: ModelConfig, mesh: Mesh | None, shape: Shape
) -> tuple[Running, State]:
    (T, J, n), (cache_LPGX, tokens_R), rows_Sb, next_BT = shape, state, given.rows_Sb, given.next_BT
    computed, x_BTD, cache_LPGX = compute(params, cache_LPGX, tokens_R, given.flat_BI, rows_Sb, cfg, mesh, T, J)
    head = {"lm_head": params["lm_head"]}  # the host hands over every array of it
    sampled, tokens_R = choose(head, tokens_R, computed, rows_Sb, given.extras, cfg, mesh, n)
    scored = None if next_BT is None else score(head, x_BTD, next_BT, rows_Sb, cfg, mesh, n)
    return Running(sampled, scored), State(cache_LPGX, tokens_R)


@partial(jax.jit, static_argnames=("cfg", "mesh", "T", "J"), donate_argnames="cache_LPGX")
def compute(
    params: Params, cache_LPGX: Array, tokens_R: Array, flat_BI: Array, rows_Sb: Array | None, cfg: ModelConfig,
    mesh: Mesh | None, T: int, J: int,
) -> tuple[Computed, Array, Array]:  # fmt: skip
    """The layers, over the cache; ``tokens_R`` of the step before. Also the hidden states after all tokens."""
    f = partial(_compute, cfg, T, J)
    if mesh is not None:
        where = partitions(params, cfg, mesh), STATE.cache_LPGX, WHOLE_ARRAY, WHOLE_ARRAY, WHOLE_ARRAY
        out = WHOLE_ARRAY, WHOLE_ARRAY, STATE.cache_LPGX
        f = jax.shard_map(f, mesh=mesh, in_specs=where, out_specs=out, check_vma=False)
    return f(params, cache_LPGX, tokens_R, flat_BI, rows_Sb)


@partial(jax.jit, static_argnames=("cfg", "mesh", "n_logprobs"), donate_argnames="tokens_R")
def choose(
    head: Params, tokens_R: Array, computed: Computed, rows_Sb: Array | None, extras: Extras, cfg: ModelConfig,
    mesh: Mesh | None, n_logprobs: int,
) -> tuple[Sampled, Array]:  # fmt: skip
    """Tokens, and ``tokens_R`` for the next step."""
    return _spread(partial(_choose, cfg, n_logprobs), cfg, mesh)(head, tokens_R, computed, rows_Sb, extras)


@partial(jax.jit, static_argnames=("cfg", "mesh", "n_logprobs"))
def score(
    head: Params, x_BTD: Array, next_BT: Array, rows_Sb: Array | None, cfg: ModelConfig, mesh: Mesh | None,
    n_logprobs: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Log softmax at ``next`` after every token, and the n most likely."""

    def scores(params: Params, x_BTD: Array, next_BT: Array, rows_Sb: Array | None) -> tuple[Array, Array, Array]:
        return _scores(params, x_BTD, next_BT, n_logprobs, _ops(rows_Sb, len(next_BT), cfg))

    return _spread(scores, cfg, mesh)(head, x_BTD, next_BT, rows_Sb)


def _spread(f: Callable, cfg: ModelConfig, mesh: Mesh | None) -> Callable:
    """f of weights as they lie on the mesh, and of arrays that are the same on all devices, as are its results."""

    def g(params: Params, *arrays: Any) -> Any:
        if mesh is None:
            return f(params, *arrays)
        where = partitions(params, cfg, mesh), *(WHOLE_ARRAY for _ in arrays)
        return jax.shard_map(f, mesh=mesh, in_specs=where, out_specs=WHOLE_ARRAY, check_vma=False)(params, *arrays)

    return g


def _ops(rows_Sb: Array | None, B: int, cfg: ModelConfig) -> Ops:
    return ON_ONE_DEVICE if rows_Sb is None else sharded_ops(rows_Sb, B, cfg.vocab_size)


def _compute(
    cfg: ModelConfig, T: int, J: int, params: Params, cache_LPGX: Array, tokens_R: Array, flat_BI: Array,
    rows_Sb: Array | None,
) -> tuple[Computed, Array, Array]:  # fmt: skip
    n_columns = len(INTS) + len(BITS)
    start_B, length_B, feed_B, drafted_B, _ = flat_BI.T[: len(INTS)]
    tokens_BT, pages_BP = flat_BI[:, n_columns : n_columns + T], flat_BI[:, n_columns + T :]
    fed_B = jnp.where(feed_B >= 0, tokens_R[jnp.maximum(feed_B, 0)], tokens_BT[:, 0])
    tokens_BT = tokens_BT.at[:, 0].set(fed_B)
    ops = _ops(rows_Sb, len(flat_BI), cfg)
    x_BTD, cache_LPGX = forward(params, cfg, cache_LPGX, tokens_BT, start_B, length_B, pages_BP, ops)
    drafts_BJ = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))[:, :J]  # drafts follow a row's one known token
    x_BJD = after(x_BTD, length_B - 1 - drafted_B, J)
    return Computed(x_BJD, drafts_BJ, flat_BI[:, :n_columns]), x_BTD, cache_LPGX


def _choose(
    cfg: ModelConfig, n: int, params: Params, tokens_R: Array, computed: Computed, rows_Sb: Array | None,
    extras: Extras,
) -> tuple[Sampled, Array]:  # fmt: skip
    x_BJD, drafts_BJ, columns_BI = computed
    B = len(x_BJD)
    ops = _ops(rows_Sb, B, cfg)
    start_B, length_B, _, drafted_B, top_k_B = columns_BI.T[: len(INTS)]
    seed_B, *real = columns_BI.T[len(INTS) :]
    temperature_B, top_p_B, min_p_B, *penalties = (lax.bitcast_convert_type(a, jnp.float32) for a in real)
    sampling = Sampling(
        lax.bitcast_convert_type(seed_B, jnp.uint32), temperature_B, top_k_B, top_p_B, min_p_B, *penalties
    )
    at_B = start_B + length_B - drafted_B
    at_B, drafts_BJ, drafted_B, sampling, extras = ops.share((at_B, drafts_BJ, drafted_B, sampling, extras))
    sampled = ops.gathered(sample(ops.head(params, x_BJD), at_B, drafts_BJ, drafted_B, sampling, extras, n), B)
    return sampled, tokens_R.at[:B].set(sampled.tokens_BJ[:, 0])


def _scores(params: Params, x_BTD: Array, next_BT: Array, n: int, ops: Ops) -> tuple[Array, Array, Array]:
    """log softmax at ``next`` after every token, and the n most likely; [B, T, V] is never whole."""
    B, T = next_BT.shape
    t = min(max(ROWS // B, 1), T)

    def some(positions: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        x_BtD, next_Bt = positions
        logits_BtV = ops.head(params, x_BtD)
        logits_BtV -= jax.nn.logsumexp(logits_BtV, axis=-1, keepdims=True)
        top_Btn, tokens_Btn = lax.top_k(logits_BtV, n)
        own_Bt1 = jnp.take_along_axis(logits_BtV, ops.share(next_Bt)[..., None], axis=-1)
        return ops.gathered((own_Bt1[..., 0], tokens_Btn, top_Btn), B)

    def pieces(a_BT: Array) -> Array:
        a_BT = jnp.pad(a_BT, [(0, 0), (0, -T % t)] + [(0, 0)] * (a_BT.ndim - 2))
        return a_BT.reshape(B, -1, t, *a_BT.shape[2:]).swapaxes(0, 1)

    found = lax.map(some, (pieces(x_BTD), pieces(next_BT)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, len(a) * t, *a.shape[3:])[:, :T], found)
