"""A report on serving as lines for people."""

from __future__ import annotations

from kimi_jax.ahead.serving import CompiledServing, ServingReport
from kimi_jax.ahead.table import assuming


def serving_table(r: ServingReport) -> str:
    lines = [
        f"{r.phase} on {r.topology}: {r.devices} devices {r.device_kind} ({r.chips} chips), weights in {r.weights}, "
        f"cache in {r.cache_dtype}",
        f"{r.rows} rows of {r.width} new tokens after {r.past}",
        f"lowered in {r.lower_seconds:.1f} s, compiled in {r.compile_seconds:.1f} s",
        "",
        f"memory: {'fits' if r.fits else 'does NOT fit'}, peak {r.peak_gib:.2f} of {r.hbm_gib:g} GiB per device "
        f"({r.peak_over_hbm:.0%})",
        *(f"  {name:28} {getattr(r, f'{name}_gib'):>9.3f} GiB" for name in ("weights", "cache", "temporaries")),
        f"  {'such pasts beside this step':28} {r.most_rows:>9} at most, in 92 % of the memory",
        f"  {'past of so many rows':28} {r.longest_past:>9} tokens at most",
    ]
    if r.compiled:
        lines += ["", *_compiled(r, r.compiled)]
    return "\n".join([*lines, "", *assuming(r.assumptions)])


def _compiled(r: ServingReport, c: CompiledServing) -> list[str]:
    wire = [
        f"  {t.kind:20} {t.axes:10} {t.bytes / 1e9:>10.4g} GB {1e3 * t.seconds:>10.3g} ms {t.runs:>6.0f} runs"
        for t in c.traffic
    ]
    times = [
        ("products and kernels", c.work.product_seconds + c.work.kernel_seconds),
        ("HBM and products", c.time.busy),
        ("links of the torus", c.time.links),
        ("the bound", r.bound.seconds),
    ]
    speeds = [
        ("bound", r.bound_tokens_per_s_per_chip),
        ("everything overlapped", c.tokens_per_s_per_chip_overlapped),
        ("nothing overlapped", c.tokens_per_s_per_chip_serial),
    ]
    return [
        "bytes through HBM per step, all devices",
        f"  {'bound':28} {r.bound.bytes / 1e9:>9.4g} GB",
        f"  {'compiled, read':28} {c.read_bytes / 1e9:>9.4g} GB {c.read_over_bound:.3f} x the bound",
        f"  {'compiled, written':28} {c.written_bytes / 1e9:>9.4g} GB",
        "",
        f"on the wire per device and step: {c.wire_bytes / 1e9:.4g} GB",
        *wire,
        "",
        "modelled step",
        *(f"  {name:28} {1e3 * seconds:>9.4g} ms" for name, seconds in times),
        "tokens/s per chip",
        *(f"  {name:28} {speed:>9.4g} {speed * r.chips:>9.5g} of the slice" for name, speed in speeds),
    ]
