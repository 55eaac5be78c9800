"""Reports as lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kimi_jax.ahead.hardware import GIB, Assumption
from kimi_jax.ahead.report import Compiled, Report

MEMORY = ("parameters", "optimizer", "batch", "activations", "temporaries")


def table(report: Report) -> str:
    """Everything in a report, a section each: program, memory, FLOPs, traffic, time, assumptions."""
    lines = [*_what(report), "", *_memory(report)]
    if report.compiled:
        lines += ["", *_flops(report, report.compiled), "", *_traffic(report.compiled), "", *_time(report.compiled)]
    return "\n".join([*lines, "", *assuming(report.assumptions)])


def assuming(assumptions: Iterable[Assumption]) -> list[str]:
    return ["assuming", *(f"  {a.name:28} {a.value:>9.4g} {a.unit:20} {a.source}" for a in assumptions)]


def _what(r: Report) -> list[str]:
    slices = f"{r.slices} x " if r.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in r.mesh.items()) or "one device"
    return [
        f"{r.phase} on {slices}{r.topology}: {r.devices} devices {r.device_kind}, mesh {mesh}",
        f"{r.sequences_per_device:g} sequences of {r.seq_len} per device at a time, accumulation {r.accumulation}, "
        f"remat {r.remat}",
        f"lowered in {r.lower_seconds:.1f} s, compiled in {r.compile_seconds:.1f} s",
    ]


def _memory(r: Report) -> list[str]:
    verdict = "fits" if r.fits else "does NOT fit"
    head = f"memory: {verdict}, peak {r.peak_gib:.2f} of {r.hbm_gib:g} GiB per device ({r.peak_over_hbm:.0%})"
    rows = [f"  {name:28} {getattr(r, f'{name}_gib'):>9.3f} GiB" for name in MEMORY]
    rows += [f"  {'on the host':28} {r.host_gib:>9.3f} GiB"] if r.host_gib else []
    rows += [f"  {'peak by estimate alone':28} {r.estimated_gib:>9.3f} GiB"]
    if r.compiled:
        rows.append(f"  {_routing(r.compiled)}")
    return [head, *rows]


def _routing(c: Compiled) -> str:
    routing = c.routing
    if routing.dynamic_arrays:
        return f"worst-case routing: unknown, {routing.dynamic_arrays} arrays have sizes that the data decide"
    loops = ", ".join(routing.loops) or "none"
    return (
        "worst-case routing: the same peak, for no array has a size that the data decide; "
        f"{len(routing.loops)} loops have such a length ({loops}) and count as one round here"
    )


def _flops(r: Report, c: Compiled) -> list[str]:
    rows = [
        ("model", r.model_flops_per_device, f"{r.seconds_at_peak:.3g} s at peak"),
        ("compiled", c.flops, f"{c.flops_over_model:.2f} x model"),
        *((f"  products, {name}", n, "") for name, n in c.work.product_flops.items() if n),
        ("  kernels, as declared", c.work.kernel_flops, _undeclared(c)),
        ("optimizer", c.optimizer_flops, _over_minimum(c)),
    ]
    return ["FLOPs per device and step", *(f"  {name:28} {n:>9.3e} {note}".rstrip() for name, n, note in rows)]


def _undeclared(c: Compiled) -> str:
    unknown = ", ".join(sorted(c.work.kernels_undeclared))
    return f"(nothing declared: {unknown})" if unknown else ""


def _over_minimum(c: Compiled) -> str:
    over = c.optimizer_flops_over_minimum
    return "" if over is None else f"{over:.2f} x Newton-Schulz's minimum"


def _traffic(c: Compiled) -> list[str]:
    scopes = ", ".join(f"{name} {gb:.4g}" for name, gb in c.wire_gb_by_scope.items() if gb)
    rows = [
        f"  {t.kind:20} {t.axes:22} {t.bytes / 1e9:>10.4g} GB {t.seconds:>10.3g} s {t.runs:>8.0f} runs"
        for t in c.traffic
    ]
    return [f"on the wire per device and step: {c.wire_gb:.4g} GB ({scopes})", *rows]


def _time(c: Compiled) -> list[str]:
    w, t = c.work, c.time
    rows = [
        ("products", w.product_seconds, ""),
        ("kernels", w.kernel_seconds, ""),
        ("bound by HBM", w.memory_seconds, f"{w.hbm_bytes / GIB:.4g} GiB read and written in all"),
        ("links of the torus", t.links, ""),
        ("between slices", t.network, ""),
        ("to and from the host", t.host, f"{w.host_bytes / GIB:.4g} GiB"),
        ("nothing overlapped", t.serial, f"MFU {c.mfu_serial:.1%}"),
        ("everything overlapped", t.overlapped, f"MFU {c.mfu_overlapped:.1%}"),
        ("the compiler's estimate", w.compiler_seconds, "without kernels and collectives"),
    ]
    return ["modelled step", *(f"  {name:28} {seconds:>9.3g} s {note}".rstrip() for name, seconds, note in rows)]


COLUMNS = ("rank", "mesh", "seq/device", "remat", "peak GiB", "FLOPs/model", "wire GB", "step s", "MFU %", "us/token")


def ranking(reports: Sequence[dict[str, Any]]) -> str:
    """One line per report as JSON has it, in the order given; a step and its MFU from all to nothing overlapped."""
    return grid(COLUMNS, [_row(k + 1, r) for k, r in enumerate(reports)])


def _row(rank: int, r: dict[str, Any]) -> list[str]:
    mesh = " ".join(f"{axis}{size}" for axis, size in r["mesh"].items())
    fits = "" if r["fits"] else " no"
    first = [str(rank), mesh, f"{r['sequences_per_device']:g}", r["remat"], f"{r['peak_gib']:.1f}{fits}"]
    c = r["compiled"]
    if c is None:
        return [*first, *["-"] * (len(COLUMNS) - len(first))]
    return [
        *first,
        f"{c['flops_over_model']:.2f}",
        f"{c['wire_gb']:.0f}",
        f"{c['seconds_overlapped']:.3g}-{c['seconds_serial']:.3g}",
        f"{100 * c['mfu_serial']:.1f}-{100 * c['mfu_overlapped']:.1f}",
        f"{1e6 * c['seconds_per_token']:.3g}",
    ]


def grid(head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry."""
    lines = [list(head), *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
