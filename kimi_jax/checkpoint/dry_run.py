"""What a conversion would read, write and hold, from config.json and the headers that are there."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kimi_jax.checkpoint import int4, paths
from kimi_jax.checkpoint.expected import Expected
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, STRAY
from kimi_jax.checkpoint.report import gib
from kimi_jax.checkpoint.source import Source
from kimi_jax.checkpoint.units import make_plan


def dry_run(source: paths.AnyPath, dtype: str, shares: int = 1, workers: int = 2) -> dict[str, Any]:
    """Plans the conversion of a directory of which config.json may be all that is there; prints and gives the plan."""
    there = any(name.endswith(".safetensors") for name in paths.sizes(source))
    if there:
        opened = Source.open(source)
        counts = Counter(map(_kind, opened.tensors))
    else:
        opened = Expected.open(source)
        counts = opened.count()
    plan = make_plan(opened, dtype)
    by_share = [sum(unit.nbytes for unit in plan.share(i, shares)) for i in range(shares)]
    worker = max(unit.peak_bytes for unit in plan.units)
    found = {
        "dry_run": True,
        "from": "headers" if there else "config.json",
        "tensors": sum(counts.values()),
        "weights": counts["weights"],
        "scales": counts["scales"],
        "strays": counts["strays"],
        "arrays": len(plan.arrays),
        "chunks": len(plan.units),
        "bytes": plan.nbytes,
        "hosts": shares,
        "bytes_per_host": max(by_share),
        "peak_bytes_per_worker": worker,
        "peak_bytes_per_host": worker * workers,
    }
    print(
        f"{found['tensors']:,} tensors planned from {found['from']}, none left over: {counts['weights']:,} weights, "
        f"{counts['scales']:,} scales and the like, {counts['strays']:,} that are no parameters\n"
        f"{len(plan.arrays)} arrays in {len(plan.units):,} chunks, {gib(plan.nbytes)} as {dtype}\n"
        f"{shares} host{'s' if shares > 1 else ''}: at most {gib(max(by_share))} each\n"
        f"peak memory: {gib(worker)} per worker, {gib(worker * workers)} per host with {workers} workers"
    )
    return found


def _kind(name: str) -> str:
    if STRAY.fullmatch(name):
        return "strays"
    return "scales" if name.endswith((SCALE_SUFFIX, *int4.SUFFIXES[1:])) else "weights"
