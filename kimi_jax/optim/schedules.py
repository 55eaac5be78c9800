"""Learning-rate schedules (Kimi K2 report, arXiv 2507.20534, section 2.5)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from kimi_jax.dims import Array


def warmup_stable_cosine(
    peak: float,
    *,
    warmup_steps: int,
    stable_tokens: float,
    decay_tokens: float,
    final: float,
    tokens_per_step: int,
    anneal_tokens: float = 0,
    anneal_final: float | None = None,
) -> Callable[[Array], Array]:
    """The rate as a function of the number of steps taken.

    Linear from 0 to ``peak`` over ``warmup_steps``; ``peak`` until ``stable_tokens``; a cosine to ``final`` over the
    next ``decay_tokens``; linear to ``anneal_final`` over the next ``anneal_tokens``; constant from there. Tokens are
    counted from the first step. Without ``decay_tokens`` the rate stays at ``peak`` until annealing starts.
    """
    stable, decay, anneal = (tokens / tokens_per_step for tokens in (stable_tokens, decay_tokens, anneal_tokens))
    low = final if decay else peak
    last = low if anneal_final is None or not anneal else anneal_final

    def rate(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0
        cosine = jnp.clip((step - stable) / max(decay, 1e-9), 0, 1)
        decayed = low + 0.5 * (peak - low) * (1 + jnp.cos(jnp.pi * cosine))
        annealed = jnp.clip((step - stable - decay) / max(anneal, 1e-9), 0, 1) if anneal else 0.0
        return warm * (decayed + (last - low) * annealed)

    return rate
