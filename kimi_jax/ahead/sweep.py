"""The best mesh, sequences per device and remat policy for a slice, and what would fit where a choice does not.

The choices: every split of a slice's devices over fsdp, expert and tensor (context as configured, data over slices), 1
to 32 sequences per device, every remat policy. ``estimate`` prunes them in milliseconds each; the best are compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from kimi_jax.ahead.estimate import Estimate, estimate, state_gib
from kimi_jax.ahead.hardware import CHIPS, of_kind
from kimi_jax.ahead.report import Report
from kimi_jax.errors import UserError
from kimi_jax.model import REMAT_POLICIES
from kimi_jax.sharding.mesh import BATCH, MeshConfig, make_mesh
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.placement import check_context

FULL = 0.92  # of HBM: what is left is for the runtime and fragmentation
SEQUENCES = (1, 2, 4, 8, 16, 32)
TENSOR = (1, 2, 4, 8)


@dataclass(frozen=True)
class Choice:
    cfg: TrainConfig
    estimate: Estimate

    @property
    def overrides(self) -> list[str]:
        """What a command line needs for it, beside the config that it is made from."""
        mesh = [f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(self.cfg.mesh).items()]
        return [*mesh, f"accumulation={self.cfg.accumulation}", f"model.remat={self.cfg.model.remat}"]

    def __str__(self) -> str:
        return " ".join(self.overrides)


def choices(cfg: TrainConfig, devices: Sequence[Any], slices: int) -> list[Choice]:
    """Those that fit by estimate, the least time per token first; raises ``UserError`` if there are none."""
    check_context(cfg)
    kind = devices[0].device_kind
    limit, every = FULL * of_kind(CHIPS, kind).hbm_gib, list(meshes(cfg, devices, slices))
    if not every:
        raise UserError(
            f"no mesh of {len(devices)} devices with mesh.context = {cfg.mesh.context} divides every parameter: "
            "change mesh.context, or the model's sizes"
        )
    least = min(state_gib(cfg, mesh) for mesh in every)
    if least > limit:
        raise UserError(
            f"parameters, optimizer and gradients alone need {least:.1f} GiB a device, of {limit:.1f} on a {kind}: "
            f"use {_times(least / limit)} times as many devices"
        )
    found = [Choice(c, e) for mesh in every for c, e in _on(cfg, mesh)]
    if not found:
        raise UserError(
            f"no mesh of {len(devices)} devices divides batch_size {cfg.batch_size} and every parameter: "
            "change batch_size"
        )
    fit = sorted((c for c in found if c.estimate.gib <= limit), key=lambda choice: choice.estimate.seconds_per_token)
    if not fit:
        least = min(choice.estimate.gib for choice in found)
        raise UserError(
            f"by estimate nothing fits: the least is {least:.1f} GiB a device, of {limit:.1f} on a {kind}: "
            f"use {_times(least / limit)} times as many devices"
        )
    return fit


def _times(ratio: float) -> int:
    """The least power of two, from 2 on, that is no less than ``ratio``: slices come in such sizes."""
    return 2 ** max(1, math.ceil(math.log2(ratio)))


def meshes(cfg: TrainConfig, devices: Sequence[Any], slices: int) -> Iterator[Mesh]:
    """Every split of a slice that the torus has and the model's parameters allow."""
    n, context = len(devices) // slices, cfg.mesh.context
    for tensor in (t for t in TENSOR if cfg.model.num_attention_heads % t == 0 and n % (t * context) == 0):
        rest = n // (tensor * context)
        for expert in (e for e in range(1, rest + 1) if rest % e == 0 and cfg.model.n_routed_experts % e == 0):
            try:
                mesh = make_mesh(MeshConfig(slices, rest // expert, expert, tensor, context), devices)
                state_gib(cfg, mesh)
            except (UserError, NotImplementedError):  # no such dimensions, or a parameter does not divide
                continue
            yield mesh


def _on(cfg: TrainConfig, mesh: Mesh) -> Iterator[tuple[TrainConfig, Estimate]]:
    sizes = MeshConfig(**{axis: mesh.shape[axis] for axis in mesh.axis_names})
    rows = math.prod(mesh.shape[axis] for axis in BATCH)
    for remat in REMAT_POLICIES:
        for sequences in SEQUENCES:
            accumulation, left = divmod(cfg.batch_size, rows * sequences)
            if accumulation and not left:
                model = cfg.model.replace(remat=remat)
                choice = dataclasses.replace(cfg, mesh=sizes, model=model, accumulation=accumulation)
                yield choice, estimate(choice, mesh)


def would_fit(cfg: TrainConfig, devices: Sequence[Any], report: Report, slices: int) -> list[str]:
    """The nearest choices that fit where ``cfg`` does not, by the estimate scaled to what the compiler said.

    One change at a time: another remat policy, fewer sequences per device; else any choice on these devices; else how
    many times the devices ``cfg`` would take as it is, since all that a device holds shrinks with them.
    """
    limit, known = FULL * report.hbm_gib, report.peak_gib / report.estimated_gib
    mesh = make_mesh(cfg.mesh, devices)

    def fits(choice: TrainConfig) -> bool:
        return known * estimate(choice, mesh).gib <= limit

    found = []
    for remat in (r for r in REMAT_POLICIES if r != cfg.model.remat):
        if fits(dataclasses.replace(cfg, model=cfg.model.replace(remat=remat))):
            found.append(f"model.remat={remat}")
    rows = math.prod(mesh.shape[axis] for axis in BATCH)
    for sequences in sorted((s for s in SEQUENCES if s * rows * cfg.accumulation < cfg.batch_size), reverse=True):
        accumulation, left = divmod(cfg.batch_size, rows * sequences)
        if not left and fits(dataclasses.replace(cfg, accumulation=accumulation)):
            found.append(f"accumulation={accumulation} ({sequences} sequences per device)")
            break
    if found:
        return found
    try:
        fit = choices(cfg, devices, slices)
    except UserError:  # nothing, even by estimate
        fit = []
    more = f"{_times(report.peak_gib / limit)} times as many devices"
    return [str(c) for c in fit if known * c.estimate.gib <= limit][:1] or [more]
