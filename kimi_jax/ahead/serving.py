"""A step of the engine compiled for a slice that is not there: does it fit, what does it read, how fast may it be?

Decode: one new token for each of ``rows`` requests. Prefill: a chunk of ``width`` tokens of each. All have ``past``
tokens in the cache; requests are spread evenly over the devices, and every expert is equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.ahead.attempt import attempt
from kimi_jax.ahead.bound import Bound, bound, chosen_experts, expert_parameters
from kimi_jax.ahead.collectives import collectives
from kimi_jax.ahead.hardware import CHIPS, GIB, Assumption, assumptions, of_kind
from kimi_jax.ahead.memory import held
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.roofline import StepTime, Traffic, Work, step_time, traffic, work_of
from kimi_jax.config import ModelConfig
from kimi_jax.inference import attention, cache, step, weights
from kimi_jax.inference.cache import PAGE_SIZE
from kimi_jax.inference.sampling import NO_EXTRAS
from kimi_jax.inference.sharded import AXIS, serving_mesh

LANES = 128
ROOM = 0.92  # of the memory that may be filled


@dataclass(frozen=True)
class Serving:
    """What is served, and the step in question."""

    cfg: ModelConfig
    phase: str  # decode or prefill
    rows: int
    past: int
    width: int  # new tokens of a row
    weights: str  # see ``inference.weights``
    cache_dtype: str


@dataclass(frozen=True)
class ServingReport:
    """Memory in GiB of one device. Bytes of ``read`` and ``bound`` are of all devices together, per step."""

    topology: str
    phase: str
    devices: int
    chips: int
    device_kind: str
    weights: str
    cache_dtype: str
    rows: int
    width: int
    past: int
    fits: bool
    hbm_gib: float
    peak_gib: float
    peak_over_hbm: float
    weights_gib: float
    cache_gib: float
    temporaries_gib: float
    most_rows: int  # whose past, as long as this, the cache holds beside this step, in ROOM of the memory
    longest_past: int  # of so many rows, likewise
    lower_seconds: float
    compile_seconds: float
    bound: Bound
    bound_tokens_per_s_per_chip: float
    compiled: CompiledServing | None  # None if it does not fit
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True)
class CompiledServing:
    """Bytes of all devices; ``tokens_per_s`` lies between nothing and everything overlapped."""

    read_bytes: float
    read_over_bound: float
    written_bytes: float
    flops: float  # of one device
    wire_bytes: float  # of one device
    work: Work
    traffic: tuple[Traffic, ...]
    time: StepTime
    tokens_per_s_serial: float
    tokens_per_s_overlapped: float
    tokens_per_s_per_chip_serial: float
    tokens_per_s_per_chip_overlapped: float


def compile_serving(it: Serving, devices: Sequence[Any], topology: str) -> tuple[ServingReport, str | None]:
    """The report, and the compiled program's text: None if it does not fit."""
    mesh, kind = serving_mesh(devices), devices[0].device_kind
    n = mesh.size
    params = weights.abstract(it.cfg, it.weights, mesh)
    rows_here, pages = -(-it.rows // n), -(-(it.past + it.width) // PAGE_SIZE)

    def whole(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    slots = jax.ShapeDtypeStruct(
        cache.shape(it.cfg, n * (1 + rows_here * pages), PAGE_SIZE, LANES), it.cache_dtype,
        sharding=NamedSharding(mesh, PartitionSpec(None, AXIS)),
    )  # fmt: skip
    state = step.State(slots, whole(it.rows))  # pyright: ignore[reportArgumentType]
    given = step.Given(whole(it.rows, step.columns(it.width, pages)), whole(n, rows_here), NO_EXTRAS, None)
    lower = partial(step.step.lower, params, state, given, cfg=it.cfg, mesh=mesh, shape=step.Shape(it.width, 1, 0))
    text, peak, hbm, _, lower_seconds, compile_seconds = attempt(lower, kind)
    weights_gib, cache_gib = held(params) / GIB, held(slots) / GIB
    least = bound(it.cfg, it.rows, it.width, it.past, jnp.dtype(it.cache_dtype).itemsize, kind, n)
    token_gib = cache.n_bytes(it.cfg, 2, 1, LANES, it.cache_dtype) / 2 / GIB
    free = ROOM * hbm - (peak - cache_gib)
    chips = n // of_kind(CHIPS, kind).devices
    report = ServingReport(
        topology=topology,
        phase=it.phase,
        devices=n,
        chips=chips,
        device_kind=kind,
        weights=it.weights,
        cache_dtype=it.cache_dtype,
        rows=it.rows,
        width=it.width,
        past=it.past,
        fits=text is not None,
        hbm_gib=hbm,
        peak_gib=peak,
        peak_over_hbm=peak / hbm,
        weights_gib=weights_gib,
        cache_gib=cache_gib,
        temporaries_gib=peak - weights_gib - cache_gib,
        most_rows=n * max(0, int(free / (token_gib * pages * PAGE_SIZE))),
        longest_past=max(0, int(free / (token_gib * rows_here))),
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        bound=least,
        bound_tokens_per_s_per_chip=least.tokens_per_s / chips,
        compiled=_compiled(it, mesh, text, least, chips) if text else None,
        assumptions=assumptions(kind),
    )
    return report, text


def _compiled(it: Serving, mesh: Any, text: str, least: Bound, chips: int) -> CompiledServing:
    devices, kind = list(mesh.devices.flat), mesh.devices.flat[0].device_kind
    program = Program.from_text(text, {attention.WALK: -(-(it.past + it.width) // attention.BLOCK)})
    done = work_of(program, kind)
    moved = traffic(list(collectives(program, dict(mesh.shape))), devices)
    spared = _unchosen_bytes(it, len(devices))
    took = step_time(done, moved, kind)
    busy = took.busy - spared / of_kind(CHIPS, kind).hbm_bytes_per_s
    took = StepTime(busy, took.links, took.network, took.host)
    read = (done.hbm_bytes - done.hbm_written - spared) * len(devices)
    tokens = it.rows * it.width
    return CompiledServing(
        read_bytes=read,
        read_over_bound=read / least.bytes,
        written_bytes=done.hbm_written * len(devices),
        flops=done.flops,
        wire_bytes=sum(row.bytes for row in moved),
        work=done,
        traffic=moved,
        time=took,
        tokens_per_s_serial=tokens / took.serial,
        tokens_per_s_overlapped=tokens / took.overlapped,
        tokens_per_s_per_chip_serial=tokens / took.serial / chips,
        tokens_per_s_per_chip_overlapped=tokens / took.overlapped / chips,
    )


def _unchosen_bytes(it: Serving, devices: int) -> float:
    """Of experts that no token chooses: kernels declare the reading of all, and make it if all are chosen."""
    bits = 2 if weights.FORMATS[it.weights] is None else 1
    share = 1 - chosen_experts(it.cfg, it.rows * it.width) / it.cfg.n_routed_experts
    return share * bits * expert_parameters(it.cfg) / devices
