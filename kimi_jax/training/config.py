"""Everything that defines a training run."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kimi_jax.config import ModelConfig, from_dict
from kimi_jax.data.pipeline import DataConfig
from kimi_jax.errors import UserError
from kimi_jax.pods.config import PodsConfig
from kimi_jax.sharding.mesh import MeshConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """MuonClip, or AdamW on every parameter; see ``kimi_jax.optim``."""

    name: str = "muon_clip"
    learning_rate: float = 2e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    momentum_dtype: str | None = None  # as it is kept; None: that of the parameters
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"
    split_fused: bool = False
    tau: float | None = 100.0  # QK-Clip's threshold; None turns it off
    b1: float = 0.9
    b2: float = 0.95
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        if self.name not in ("muon_clip", "adamw"):
            raise UserError(f"optimizer.name must be muon_clip or adamw, not {self.name!r}")
        if self.momentum_dtype not in (None, "bfloat16", "float32"):
            raise UserError(f"optimizer.momentum_dtype must be bfloat16 or float32, not {self.momentum_dtype!r}")
        if self.ns_dtype not in ("bfloat16", "float32"):
            raise UserError(f"optimizer.ns_dtype must be bfloat16 or float32, not {self.ns_dtype!r}")
        if self.ns_steps < 1:
            raise UserError(f"optimizer.ns_steps must be at least 1, not {self.ns_steps}")
        _check_numbers("optimizer.", self, "learning_rate", "weight_decay")
        _check_numbers("optimizer.", self, "tau", "max_grad_norm", above=True)
        _check_numbers("optimizer.", self, "momentum", "b1", "b2", below=1)


def _check_numbers(section: str, config: Any, *names: str, above: bool = False, below: float = math.inf) -> None:
    """``UserError`` for a number that is negative, not below ``below``, or, with ``above``, zero; None is none."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (0 <= value < below and (value or not above)):
            limits = f"{'above' if above else 'at least'} 0 and {'finite' if below == math.inf else f'below {below}'}"
            raise UserError(f"{section}{name} must be {limits}, not {value}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, stable, cosine, anneal (``optim.warmup_stable_cosine``); factors of the peak rate, lengths in tokens."""

    warmup_steps: int = 500
    stable_tokens: int = 0
    decay_tokens: int = 0
    final_factor: float = 0.1
    anneal_tokens: int = 0
    anneal_factor: float = 0.1

    def __post_init__(self):
        _check_numbers("schedule.", self, *(field.name for field in dataclasses.fields(self)))


@dataclass(frozen=True)
class EmergencyConfig:
    """Copies of the training state between two checkpoints, on the hosts themselves.

    ``folder``: local to each host, such as /dev/shm/kimi or on an SSD; None keeps no copies.
    ``every``: steps from one copy to the next.
    """

    folder: str | None = None
    every: int = 50

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"emergency.every must be at least 1, not {self.every}")


@dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mesh: MeshConfig = MeshConfig()
    pods: PodsConfig = PodsConfig()
    emergency: EmergencyConfig = EmergencyConfig()
    init_from: str | None = None  # weights to start from: whatever kimi_jax.load reads; None draws new ones
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8  # sequences per optimizer step, over all devices and microbatches
    seq_len: int = 512
    accumulation: int = 1  # microbatches per optimizer step
    dispatch: str = "exact"  # how tokens travel to the experts: as they are, or in "fp8", at half the bytes
    balance_loss_weight: float = 1e-3
    bias_update_rate: float = 1e-3
    eval_every: int = 500
    eval_batches: int = 16
    checkpoint_every: int = 500
    checkpoints_kept: int = 3
    log_every: int = 10
    nonfinite: str = "stop"  # or "skip": what to do on a non-finite loss or gradient
    sample_prompt: str = "def "
    sample_tokens: int = 128

    def __post_init__(self):
        counts = ("steps", "batch_size", "seq_len", "accumulation", "log_every")
        for name in (*counts, "eval_every", "eval_batches", "checkpoint_every", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        _check_numbers("", self, "balance_loss_weight", "bias_update_rate")
        if self.batch_size % self.accumulation:
            raise UserError(f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}")
        if self.dispatch not in ("exact", "fp8"):
            raise UserError(f"dispatch must be exact or fp8, not {self.dispatch!r}")
        if self.nonfinite not in ("stop", "skip"):
            raise UserError(f"nonfinite must be stop or skip, not {self.nonfinite!r}")
        if self.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len {self.seq_len} exceeds model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed must lie in -2**63..2**63 - 1, not {self.seed}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> TrainConfig:
        values = dict(cfg)
        if not isinstance(values.get("model"), Mapping):
            raise UserError("the config needs a model section, such as model=dict(preset='tiny')")
        for name in ("sources", "eval_sources"):
            given = values["data"].get(name) if isinstance(values.get("data"), Mapping) else None
            if isinstance(given, str):
                raise UserError(f"""config.data.{name} is a list of paths: write '["{given}"]'""")
        return from_dict(cls, {**values, "model": ModelConfig.from_config(values["model"])}, "config")


def load(path: str | Path, overrides: list[str] = ()) -> TrainConfig:  # type: ignore[assignment]
    """The config of a Python file that defines ``get_config()``, after ``--config.KEY=VALUE`` overrides."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no config file {path}")
    values = _values(path)
    for override in overrides:
        _apply(values, override)
    return _with_absolute_tokenizer(TrainConfig.from_config(values))


def _values(path: Path) -> dict[str, Any]:
    """What ``get_config()`` of a file returns, as plain dicts."""
    loader = SourceFileLoader("kimi_jax_config", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"{path} does not define get_config()")
        found = _plain(module.get_config(), str(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"get_config() of {path} must return a dict or a ConfigDict, not {found!r}")
    return found


def _plain(value: Any, where: str) -> Any:
    """``value`` with dicts for mappings of any kind, whose keys have to be strings."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where) for entry in value]
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{where}: keys of the config must be strings, not {key!r}")
    return {key: _plain(entry, where) for key, entry in value.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one ``--config.a.b=value``; the value is a Python literal, or else a string."""
    name, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals or not name:
        raise UserError(f"{override!r}: overrides are written --config.KEY=VALUE")
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{override!r}: {section} has no keys of its own")
    values[key] = _plain(value, repr(override))


def _with_absolute_tokenizer(cfg: TrainConfig) -> TrainConfig:
    """A checkpoint names the tokenizer: its path has to hold in any directory."""
    if cfg.data.tokenizer == "bytes":
        return cfg
    path = Path(os.path.expanduser(cfg.data.tokenizer)).absolute()
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(path)))
