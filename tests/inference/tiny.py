"""The small model of all tests, and what it writes by the full forward pass alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Params
from kimi_jax.model import KimiK2
from tests import tiny

CFG = tiny.CFG.replace(experts="looped")
parameters = functools.cache(tiny.parameters)


@partial(jax.jit, static_argnums=1)
def full(params: Params, cfg: ModelConfig, tokens_BT):
    """Logits of the full forward pass."""
    return KimiK2(cfg).apply({"params": params}, tokens_BT)


def greedy(params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """``n`` tokens behind every prompt, each the most likely after all before; there are no ties."""
    texts, gaps = greedy_and_gaps(params, cfg, prompts, n)
    assert min(gaps) > 1e-4, "no comparison can be exact"
    return texts


def greedy_and_gaps(
    params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], n: int
) -> tuple[list[list[int]], list[float]]:
    """The texts, and the least difference in each between the logits of the most likely token and the next."""
    length_B, rows_B = np.asarray([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens_BT, gap_B = np.zeros((len(prompts), max(length_B) + n), np.int32), np.full(len(prompts), np.inf)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    for i in range(n):
        logits_BV = np.asarray(full(params, cfg, jnp.asarray(tokens_BT)))[rows_B, length_B + i - 1]
        best = np.sort(logits_BV, axis=-1)
        gap_B = np.minimum(gap_B, best[:, -1] - best[:, -2])
        tokens_BT[rows_B, length_B + i] = logits_BV.argmax(axis=-1)
    return [tokens_BT[b, start : start + n].tolist() for b, start in enumerate(length_B)], gap_B.tolist()
