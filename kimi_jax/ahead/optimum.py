"""The least that an optimizer step has to compute."""

from __future__ import annotations

import jax

from kimi_jax.dims import axes_of
from kimi_jax.model import init_params, specs
from kimi_jax.optim.axes import MATRIX, layouts, matrices
from kimi_jax.training.config import TrainConfig


def newton_schulz_flops(cfg: TrainConfig) -> float:
    """Of all matrices together: 4 n^2 m + 2 n^3 a step for n <= m; 0 if AdamW takes them.

    X X^T and its product with X cost 2 n^2 m each, the square of X X^T 2 n^3. That these are symmetric is not used.
    """
    if cfg.optimizer.name == "adamw":
        return 0.0
    params = jax.eval_shape(lambda: init_params(cfg.model, 0))
    found = layouts(params, axes_of(specs(cfg.model)), cfg.optimizer.split_fused)
    total = 0.0
    for leaf, layout in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        if layout.kind == MATRIX:
            for *stack, a, b in (x.shape for x in jax.eval_shape(lambda w, by=layout: matrices(w, by), leaf)):
                n, m, count = min(a, b), max(a, b), 1
                for size in stack:
                    count *= size
                total += count * cfg.optimizer.ns_steps * (4 * n * n * m + 2 * n**3)
    return total
