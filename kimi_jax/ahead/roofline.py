"""How long a compiled step takes on the chips it was compiled for, by arithmetic.

Every instruction takes the longer of its products at the stated efficiency and its HBM bytes at the data sheet's rate:

    busy = sum_i runs_i max(flops_i / (efficiency peak), bytes_i / bandwidth)

Collectives occupy the links for ``torus.seconds``, transfers between slices the network, what is offloaded the way to
the host. Either nothing overlaps or everything does: the step lies between the sum of these and the largest of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.ahead import kernels, torus, work
from kimi_jax.ahead.collectives import BETWEEN_SLICES, Collective
from kimi_jax.ahead.hardware import CHIPS, KERNEL_EFFICIENCY, of_kind
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.scopes import SCOPES, scope
from kimi_jax.ahead.topology import extent, slice_of
from kimi_jax.flops import PEAK_BF16


@dataclass(frozen=True)
class Work:
    """Of one device and step: FLOPs, HBM bytes, and the seconds of ``busy`` by what bounds them."""

    product_flops: dict[str, float]  # by scope
    kernel_flops: float  # as their authors declared them
    kernels_undeclared: dict[str, float]  # kernel -> runs, of which nothing is known
    hbm_bytes: float
    hbm_written: float  # of those
    host_bytes: float
    product_seconds: float
    kernel_seconds: float
    memory_seconds: float  # of instructions that HBM bounds
    compiler_seconds: float  # the compiler's own estimate, which knows no kernels and no collectives

    @property
    def flops(self) -> float:
        return sum(self.product_flops.values()) + self.kernel_flops

    @property
    def busy_seconds(self) -> float:
        return self.product_seconds + self.kernel_seconds + self.memory_seconds


def work_of(program: Program, kind: str) -> Work:
    chip, peak = of_kind(CHIPS, kind), of_kind(PEAK_BF16, kind)
    products: dict[str, float] = dict.fromkeys(SCOPES, 0.0)
    seconds = dict.fromkeys(("product", "kernel", "memory"), 0.0)
    undeclared: dict[str, float] = defaultdict(float)
    kernel_flops = hbm = written = host = cycles = 0.0
    for name, computation in program.computations.items():
        runs = program.runs[name]
        if name in program.fused or not runs:
            continue
        for i in computation.values():
            flops, bytes_ = work.flops(program, computation, i), work.hbm_bytes(program, computation, i)
            kernel = kernels.kernel_name(i)
            if kernel:
                kernel_flops += runs * flops
                if not kernels.declared(i, "bytes_accessed"):
                    undeclared[kernel] += runs
            else:
                products[scope(i.op_name)] += runs * flops
            computing = flops / (peak * (KERNEL_EFFICIENCY if kernel else chip.matmul_efficiency))
            moving = bytes_ / chip.hbm_bytes_per_s
            bound = "memory" if moving > computing else "kernel" if kernel else "product"
            seconds[bound] += runs * max(computing, moving)
            hbm += runs * bytes_
            written += runs * work.hbm_written(program, computation, i)
            host += runs * work.host_bytes(i)
            cycles += runs * i.cycles
    return Work(
        product_flops=products,
        kernel_flops=kernel_flops,
        kernels_undeclared=dict(undeclared),
        hbm_bytes=hbm,
        hbm_written=written,
        host_bytes=host,
        product_seconds=seconds["product"],
        kernel_seconds=seconds["kernel"],
        memory_seconds=seconds["memory"],
        compiler_seconds=cycles * chip.flops_per_cycle / peak,
    )


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same axes, per device and step."""

    kind: str
    axes: str
    runs: float
    bytes: float
    seconds: float


def traffic(found: Sequence[Collective], devices: Sequence[Any]) -> tuple[Traffic, ...]:
    """What ``found`` takes on ``devices`` (in the order of the mesh), most bytes first."""
    kind = devices[0].device_kind
    chip = of_kind(CHIPS, kind)
    size = extent([device for device in devices if slice_of(device) == slice_of(devices[0])])
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for c in found:
        across = c.axes == (BETWEEN_SLICES,)
        took = c.bytes * chip.devices / chip.dcn_bytes_per_s if across else torus.seconds(c, devices, size, chip)
        total = totals[c.kind, " x ".join(c.axes) or "one device"]
        for k, value in enumerate((c.runs, c.bytes, took)):
            total[k] += value
    rows = [Traffic(kind, axes, *total) for (kind, axes), total in totals.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; between ``overlapped`` and ``serial`` lies what the schedule makes of it."""

    busy: float
    links: float
    network: float
    host: float

    @property
    def serial(self) -> float:
        return self.busy + self.links + self.network + self.host

    @property
    def overlapped(self) -> float:
        return max(self.busy, self.links, self.network, self.host)


def step_time(done: Work, moved: Sequence[Traffic], kind: str) -> StepTime:
    chip = of_kind(CHIPS, kind)
    across = sum(row.seconds for row in moved if row.axes == BETWEEN_SLICES)
    links = sum(row.seconds for row in moved) - across
    return StepTime(done.busy_seconds, links, across, done.host_bytes * chip.devices / chip.host_bytes_per_s)
