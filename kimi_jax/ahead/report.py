"""A step compiled for a slice that is not there: does it compile, does it fit, what does it move, how long may it take?

libtpu compiles for real topologies on any machine and refuses what would not fit, as the hardware does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kimi_jax.ahead.attempt import attempt
from kimi_jax.ahead.collectives import collectives
from kimi_jax.ahead.estimate import estimate
from kimi_jax.ahead.hardware import GIB, Assumption, assumptions, of_kind
from kimi_jax.ahead.memory import Routing, held, routing, saved
from kimi_jax.ahead.optimum import newton_schulz_flops
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.roofline import StepTime, Traffic, Work, step_time, traffic, work_of
from kimi_jax.ahead.scopes import SCOPES
from kimi_jax.flops import PEAK_BF16, training_flops_per_token
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.placement import Placement, lowered_step, placement, shapes


@dataclass(frozen=True)
class Compiled:
    """What the compiled program of one device does in a step; see ``roofline`` and ``memory``."""

    flops: float
    flops_over_model: float
    optimizer_flops: float  # products in the update
    optimizer_flops_over_minimum: float | None  # Newton-Schulz's, dealt out evenly; None without it
    wire_gb: float
    wire_gb_by_scope: dict[str, float]  # of several slices the compiler drops the names: all is unlabelled
    work: Work
    traffic: tuple[Traffic, ...]
    time: StepTime
    seconds_overlapped: float
    seconds_serial: float
    mfu_overlapped: float
    mfu_serial: float
    seconds_per_token: float  # serial, per token of the whole batch
    routing: Routing


@dataclass(frozen=True)
class Report:
    """Memory per device in GiB; ``temporaries_gib`` is what the peak holds beside state, batch and activations."""

    topology: str
    slices: int
    phase: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    sequences_per_device: float  # per microbatch
    accumulation: int
    seq_len: int
    remat: str
    fits: bool
    hbm_gib: float
    peak_gib: float
    peak_over_hbm: float
    parameters_gib: float
    optimizer_gib: float
    batch_gib: float
    activations_gib: float  # what the loops of the forward pass keep for the backward pass
    temporaries_gib: float
    host_gib: float
    estimated_gib: float  # by ``estimate``, for comparison
    model_flops_per_device: float
    seconds_at_peak: float  # those, at the data sheet's bf16 rate
    lower_seconds: float
    compile_seconds: float
    compiled: Compiled | None  # None if it does not fit
    assumptions: tuple[Assumption, ...]


def compile_step(cfg: TrainConfig, devices: Sequence[Any], topology: str, slices: int = 1) -> tuple[Report, str | None]:
    """The report on a training step, and the compiled program's text: None if it does not fit."""
    place, kind = placement(cfg, devices), devices[0].device_kind
    text, peak, hbm, on_host, lower_seconds, compile_seconds = attempt(partial(lowered_step, cfg, place), kind)
    state, batch = shapes(cfg, place)
    categories = {
        "parameters_gib": held(state.params) / GIB,
        "optimizer_gib": held(state.opt_state) / GIB,
        "batch_gib": held(batch) / GIB,
        "activations_gib": saved(Program.from_text(text)) / GIB if text else 0.0,
    }
    flops = training_flops_per_token(cfg.model, cfg.seq_len) * cfg.tokens_per_step / len(devices)
    report = Report(
        topology=topology,
        slices=slices,
        phase="train",
        devices=len(devices),
        device_kind=kind,
        mesh={axis: size for axis, size in place.mesh.shape.items() if size > 1},
        sequences_per_device=cfg.batch_size / cfg.accumulation / len(devices),
        accumulation=cfg.accumulation,
        seq_len=cfg.seq_len,
        remat=cfg.model.remat,
        fits=text is not None,
        hbm_gib=hbm,
        peak_gib=peak,
        peak_over_hbm=peak / hbm,
        **categories,
        temporaries_gib=peak - sum(categories.values()),
        host_gib=on_host,
        estimated_gib=estimate(cfg, place.mesh).gib,
        model_flops_per_device=flops,
        seconds_at_peak=flops / of_kind(PEAK_BF16, kind),
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        compiled=_compiled(cfg, place, text, flops, slices) if text else None,
        assumptions=assumptions(kind),
    )
    return report, text


def _compiled(cfg: TrainConfig, place: Placement, text: str, model_flops: float, slices: int) -> Compiled:
    program, devices = Program.from_text(text), list(place.mesh.devices.flat)
    kind = devices[0].device_kind
    moves = list(collectives(program, dict(place.mesh.shape), slices))
    done, moved = work_of(program, kind), traffic(moves, devices)
    took, at_peak = step_time(done, moved, kind), model_flops / of_kind(PEAK_BF16, kind)
    least = newton_schulz_flops(cfg) / len(devices) * place.mesh.shape["data"]  # every copy of the model does the same
    return Compiled(
        flops=done.flops,
        flops_over_model=done.flops / model_flops,
        optimizer_flops=done.product_flops["update"],
        optimizer_flops_over_minimum=done.product_flops["update"] / least if least else None,
        wire_gb=sum(row.bytes for row in moved) / 1e9,
        wire_gb_by_scope={name: sum(c.bytes for c in moves if c.scope == name) / 1e9 for name in SCOPES},
        work=done,
        traffic=moved,
        time=took,
        seconds_overlapped=took.overlapped,
        seconds_serial=took.serial,
        mfu_overlapped=at_peak / took.overlapped,
        mfu_serial=at_peak / took.serial,
        seconds_per_token=took.serial / cfg.tokens_per_step,
        routing=routing(program),
    )
