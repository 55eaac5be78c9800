"""A ``StepPlan`` on the device: one compiled program per shape of a plan, one array up and one step's tokens down.

The host's part of a step is bound by the number of arrays it hands over, so what every step has goes up as one int32
array, with the bits of what is not int32. Steps run in order, and each takes the cache and the tokens that the one
before leaves on the device: nothing has to come to the host before the next step can start.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.inference import cache
from kimi_jax.inference.forward import ROWS, forward, logits
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.plan import StepPlan, StepResult
from kimi_jax.inference.sampling import Extras, Sampled, Sampling, sample
from kimi_jax.model import head

WHOLE = ("start_B", "length_B", "feed_B", "drafted_B", "top_k_B")
BITS = ("seed_B", "temperature_B", "top_p_B", "min_p_B", "repetition_B", "presence_B", "frequency_B")


class State(NamedTuple):
    """What stays on the device between steps."""

    cache_LPGX: Array
    tokens_R: Array  # int32: the first token that each row of the last step sampled


def init_state(cfg: ModelConfig, limits: Limits, dtype: str | None = None) -> State:
    lanes = 1 if jax.default_backend() == "cpu" else 128
    cache_LPGX = cache.init(cfg, limits.n_pages, limits.page_size, lanes, dtype)
    return State(cache_LPGX, jnp.zeros(limits.max_rows, jnp.int32))


class Running(NamedTuple):
    """The result of a step, as soon as it is there."""

    sampled: Sampled
    scored: Any  # as ``_scores``, or None


def run(params: Params, cfg: ModelConfig, state: State, plan: StepPlan) -> tuple[Running, State]:
    """Starts a step and returns at once; ``state`` is used up. The result is on its way to the host."""
    extras: Any = (plan.seen_BU, plan.times_BU, plan.biased_BU, plan.bias_BU, plan.grammar_BJw)
    T, J, n = plan.tokens_BT.shape[1], plan.n_sampled, plan.n_logprobs
    running, state = _step(params, cfg, state, flat(plan), Extras(*extras), plan.next_BT, T, J, n)
    for array in jax.tree.leaves(running):
        array.copy_to_host_async()
    return running, state


def fetch(running: Running) -> StepResult:
    """Waits for the step."""
    sampled, scored = jax.device_get(running)
    return StepResult(*sampled, *(scored or ()))


def flat(plan: StepPlan) -> np.ndarray:
    """int32 [B, 12 + T + P]."""
    columns = [getattr(plan, name).view(np.int32)[:, None] for name in (*WHOLE, *BITS)]
    return np.concatenate([*columns, plan.tokens_BT, plan.pages_BP], axis=1)


@partial(jax.jit, static_argnums=(1, 6, 7, 8), donate_argnums=2)
def _step(
    params: Params, cfg: ModelConfig, state: State, flat_BI: Array, extras: Extras, next_BT: Array | None,
    T: int, J: int, n: int,
) -> tuple[Running, State]:  # fmt: skip
    n_whole, n_columns = len(WHOLE), len(WHOLE) + len(BITS)
    start_B, length_B, feed_B, drafted_B, top_k_B = flat_BI.T[:n_whole]
    seed_B, *real = flat_BI.T[n_whole:n_columns]
    temperature_B, top_p_B, min_p_B, *penalties = (lax.bitcast_convert_type(a, jnp.float32) for a in real)
    sampling = Sampling(
        lax.bitcast_convert_type(seed_B, jnp.uint32), temperature_B, top_k_B, top_p_B, min_p_B, *penalties
    )
    tokens_BT, pages_BP = flat_BI[:, n_columns : n_columns + T], flat_BI[:, n_columns + T :]
    fed_B = jnp.where(feed_B >= 0, state.tokens_R[jnp.maximum(feed_B, 0)], tokens_BT[:, 0])
    tokens_BT = tokens_BT.at[:, 0].set(fed_B)

    x_BTD, cache_LPGX = forward(params, cfg, state.cache_LPGX, tokens_BT, start_B, length_B, pages_BP)
    first_B = length_B - 1 - drafted_B
    drafts_BJ = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))[:, :J]  # drafts follow a row's one known token
    sampled = sample(
        logits(params, x_BTD, first_B, J), start_B + first_B + 1, drafts_BJ, drafted_B, sampling, extras, n
    )  # fmt: skip
    scored = None if next_BT is None else _scores(params, x_BTD, next_BT, n)
    tokens_R = state.tokens_R.at[: sampled.tokens_BJ.shape[0]].set(sampled.tokens_BJ[:, 0])
    return Running(sampled, scored), State(cache_LPGX, tokens_R)


def _scores(params: Params, x_BTD: Array, next_BT: Array, n: int) -> tuple[Array, Array, Array]:
    """log softmax at ``next`` after every token, and the n most likely; [B, T, V] is never whole."""

    def one(position: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        x_BD, next_B = position
        logits_BV = head(params, x_BD[:, None])[:, 0]
        logits_BV -= jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
        top_Bn, tokens_Bn = lax.top_k(logits_BV, n)
        return jnp.take_along_axis(logits_BV, next_B[:, None], axis=-1)[:, 0], tokens_Bn, top_Bn

    by_position = x_BTD.swapaxes(0, 1), next_BT.swapaxes(0, 1)
    found = lax.map(one, by_position, batch_size=max(ROWS // x_BTD.shape[0], 1))
    return jax.tree.map(lambda a: a.swapaxes(0, 1), found)
