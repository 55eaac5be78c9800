"""What a run cannot be made of is refused before anything is written."""

from __future__ import annotations

import math

import pytest

from kimi_jax import presets
from kimi_jax.errors import UserError
from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig


@pytest.mark.parametrize(
    ("kind", "name", "bad", "good"),
    [
        (OptimizerConfig, "learning_rate", [-1e-3, math.inf, math.nan], [0.0, 1.0]),
        (OptimizerConfig, "weight_decay", [-0.1, math.nan], [0.0]),
        (OptimizerConfig, "tau", [-1.0, 0.0, math.inf], [None, 0.5]),
        (OptimizerConfig, "max_grad_norm", [-1.0, 0.0, math.nan], [None, 0.5]),
        (OptimizerConfig, "momentum", [-0.1, 1.0], [0.0, 0.99]),
        (OptimizerConfig, "b1", [1.0], [0.0]),
        (OptimizerConfig, "b2", [1.0], [0.999]),
        (OptimizerConfig, "ns_steps", [0], [1]),
        (ScheduleConfig, "warmup_steps", [-1], [0]),
        (ScheduleConfig, "decay_tokens", [-1], [0]),
        (ScheduleConfig, "final_factor", [-0.1, math.inf], [0.0]),
        (TrainConfig, "eval_batches", [0, -1], [1]),
        (TrainConfig, "checkpoints_kept", [0, -1], [1]),
        (TrainConfig, "bias_update_rate", [-1e-3, math.nan], [0.0]),
    ],
)
def test_ranges(kind, name, bad, good):
    needed = {"model": presets.tiny()} if kind is TrainConfig else {}
    for value in bad:
        with pytest.raises(UserError, match=name):
            kind(**needed, **{name: value})
    for value in good:
        assert getattr(kind(**needed, **{name: value}), name) == value
