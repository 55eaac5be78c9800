"""A training step compiled for a slice that is not there: does it compile, does it fit, what does it hold?

libtpu compiles for real topologies on any machine and refuses what would not fit, as the hardware does.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from kimi_jax.errors import UserError
from kimi_jax.flops import PEAK_BF16, training_flops_per_token
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.placement import lowered_step, placement, shapes

GIB = 2**30
HBM_GIB: dict[str, float] = {
    "TPU v5 lite": 16,
    "TPU v5e": 16,
    "TPU v5": 95,
    "TPU v6": 32,
    "TPU7x": 96,
}  # per JAX device
OUT_OF_MEMORY = re.compile(r"([\d.]+)([MGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([MGT])")  # libtpu's two ways
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Report:
    """Memory per device in GiB; ``temporaries_gib`` is what the peak holds beside state and batch."""

    topology: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    sequences_per_device: float  # per microbatch
    seq_len: int
    fits: bool
    hbm_gib: float
    peak_gib: float
    parameters_gib: float
    optimizer_gib: float
    batch_gib: float
    temporaries_gib: float
    model_flops_per_device: float
    seconds_at_peak: float  # those, at the data sheet's bf16 rate
    lower_seconds: float
    compile_seconds: float


def topology_devices(name: str) -> list[Any]:
    """The devices of a topology such as ``v5p:8x8x8``, without having them."""
    for key, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        first = str(error).partition("\n")[0][:200]
        if "not installed" in first:
            raise UserError("libtpu is not installed: pip install 'kimi_jax[aot]'") from error
        raise UserError(f"{name!r} is no topology of libtpu, such as v5p:8x8x8 or v6e:16x16 ({first})") from error


def compile_step(cfg: TrainConfig, topology: str) -> tuple[Report, Any]:
    """The report, and the compiled step: None if it does not fit."""
    devices = topology_devices(topology)
    place = placement(cfg, devices)
    began = time.perf_counter()
    lowered = lowered_step(cfg, place)
    lowered_at = time.perf_counter()
    state, batch = shapes(cfg, place)
    held = {
        "parameters_gib": _held(state.params),
        "optimizer_gib": _held(state.opt_state),
        "batch_gib": _held(batch),
    }
    kind = devices[0].device_kind
    hbm = _by_kind(HBM_GIB, kind)
    compiled, peak = None, 0.0
    try:
        compiled = lowered.compile()
        memory: Any = compiled.memory_analysis()
        peak = memory.peak_memory_in_bytes / GIB
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if not found:
            raise
        peak, hbm = float(found[1]) * UNITS[found[2]] / GIB, float(found[3]) * UNITS[found[4]] / GIB
    flops = training_flops_per_token(cfg.model, cfg.seq_len) * cfg.tokens_per_step / len(devices)
    report = Report(
        topology=topology,
        devices=len(devices),
        device_kind=kind,
        mesh={axis: size for axis, size in place.mesh.shape.items() if size > 1},
        sequences_per_device=cfg.batch_size / cfg.accumulation / len(devices),
        seq_len=cfg.seq_len,
        fits=compiled is not None,
        hbm_gib=hbm,
        peak_gib=peak,
        **held,
        temporaries_gib=peak - sum(held.values()),
        model_flops_per_device=flops,
        seconds_at_peak=flops / _by_kind(PEAK_BF16, kind),
        lower_seconds=lowered_at - began,
        compile_seconds=time.perf_counter() - lowered_at,
    )
    return report, compiled


def _held(tree: Any) -> float:
    """GiB per device of arrays that know where they lie."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves) / GIB


def _by_kind(figures: Mapping[str, float], kind: str) -> float:
    return next(figures[name] for name in sorted(figures, key=len, reverse=True) if kind.startswith(name))


def table(report: Report) -> str:
    """The report as lines for people."""
    rows = dataclasses.asdict(report).items()
    return "\n".join(f"{name:24} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in rows)
