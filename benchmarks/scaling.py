"""The 1T step on slices that are not there: compiles it for each, keeps the reports, prints them as a table.

    python benchmarks/scaling.py                          # the table of what is there
    python benchmarks/scaling.py --run v5p-512 v5p-1024   # compiles these first (minutes each); all: every one
    python benchmarks/scaling.py --run all --fast         # at level O1, in half the time; the table says so
    python benchmarks/scaling.py --products               # the compiler's cycles of a large product, for each chip

One report per configuration lies in --reports, beside the command that made it and the versions; a report whose command
is no longer this file's is not shown. Exits 1 if a configuration asked for could not be compiled, or does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Configuration:
    topology: str
    overrides: str
    slices: int = 1

    @property
    def command(self) -> list[str]:
        many = ["--slices", str(self.slices)] if self.slices > 1 else []
        keys = [f"--config.{override}" for override in self.overrides.split()]
        return ["--config", "configs/kimi_k2_1t.py", "--topology", self.topology, *many, *keys]


CONFIGURATIONS = {  # one microbatch, so that bytes and seconds are those of the sequences in the table
    "v5p-512": Configuration("v5p:8x8x8", "batch_size=2048 accumulation=1"),
    "v5p-1024": Configuration("v5p:8x8x16", "mesh.fsdp=8 batch_size=4096 accumulation=1"),
    "tpu7x-256": Configuration("tpu7x:4x8x8", "batch_size=4096 accumulation=1"),
    "v6e-256": Configuration(
        "v6e:16x16",
        "mesh.fsdp=1 mesh.context=2 batch_size=128 accumulation=1 model.param_dtype=bfloat16 model.remat=offload",
    ),
    "v5p-512-32k": Configuration(
        "v5p:8x8x8", "mesh.fsdp=2 mesh.expert=64 mesh.context=4 batch_size=256 accumulation=1 seq_len=32768"
    ),
    "2x-v5p-512": Configuration("v5p:8x8x8", "batch_size=4096 accumulation=1", slices=2),
    "v5p-512-whole-batch": Configuration("v5p:8x8x8", "batch_size=16384 accumulation=8"),
}
HEAD = (
    *("slice", "devices", "mesh", "sequences per device", "remat", "peak GiB", "of HBM", "FLOPs / model"),
    *("optimizer / least", "wire GB", "update GB", "step s", "MFU %", "compiled in s"),
)


def compile_one(name: str, reports: Path, fast: bool) -> bool:
    """Whether it compiles and fits; either way the report is kept, if there is one."""
    reports.mkdir(parents=True, exist_ok=True)
    fresh = reports / f".{name}.json"
    fresh.unlink(missing_ok=True)
    command, level = CONFIGURATIONS[name].command, ["--fast"] if fast else []
    print(f"python -m kimi_jax.aot {' '.join(command + level)}", flush=True)
    run = [sys.executable, "-m", "kimi_jax.aot", *command, *level, "--json", str(fresh.absolute())]
    done = subprocess.run(run, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if fresh.exists():
        made = {"command": command, "fast": fast, "date": str(date.today())}
        made |= {package: version(package) for package in ("jax", "libtpu")}
        part = fresh.with_suffix(".part")
        part.write_text(json.dumps({**made, "report": json.loads(fresh.read_text())}, indent=1))
        part.replace(reports / f"{name}.json")
        fresh.unlink()
    return done.returncode == 0


def row(name: str, kept: dict[str, Any]) -> list[str]:
    r = kept["report"]
    mesh = " ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    sequences = f"{r['sequences_per_device']:g} x {r['seq_len']:,}"
    sequences += f", {r['accumulation']} times" if r["accumulation"] > 1 else ""
    first = [name, f"{r['devices']}", mesh, sequences, r["remat"], f"{r['peak_gib']:.1f}", f"{r['peak_over_hbm']:.0%}"]
    compiled = f"{r['compile_seconds']:.0f}" + (" (O1)" if kept.get("fast") else "")
    c = r["compiled"]
    if c is None:
        return [*first, *["does not fit"] * 6, compiled]
    over = c["optimizer_flops_over_minimum"]
    return [
        *first,
        f"{c['flops_over_model']:.2f}",
        "-" if over is None else f"{over:.2f}",
        f"{c['wire_gb']:.0f}",
        f"{c['wire_gb_by_scope']['update']:.1f}",
        f"{c['seconds_overlapped']:.2f}-{c['seconds_serial']:.2f}",
        f"{100 * c['mfu_serial']:.0f}-{100 * c['mfu_overlapped']:.0f}",
        compiled,
    ]


def table(reports: Path) -> str:
    lines, versions, missing = [HEAD, ["---"] * len(HEAD)], set(), []
    for name, configuration in CONFIGURATIONS.items():
        path = reports / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("command") == configuration.command:
            lines.append(row(name, kept))
            versions.add(f"jax {kept['jax']}, libtpu {kept['libtpu']}, {kept['date']}")
        else:
            missing.append(name)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"({'; '.join(sorted(versions))})"] if versions else []
    notes += [f"not there: {', '.join(missing)}"] if missing else []
    return "\n\n".join([text, *notes])


def cycles(device: Any, product: tuple[int, int, int]) -> int:
    """Of a product (rows, contracted, columns) in bf16 on one device, by the compiler's own model of it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from kimi_jax.ahead.program import Program

    (rows, inner, columns), here = product, SingleDeviceSharding(device)
    a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=here) for s in ((rows, inner), (inner, columns)))
    program = Program.from_text(jax.jit(jnp.matmul).lower(a, b).compile().as_text() or "")
    return sum(i.cycles for i in program.computations[program.entry].values())


def products() -> str:
    """The compiler's estimate of ``hardware.PRODUCT`` on every chip, and what share of the peak that is."""
    from kimi_jax.ahead.hardware import CHIPS, PRODUCT, of_kind
    from kimi_jax.ahead.topology import topology_devices

    lines = [("chip", "cycles", "of the peak"), ["---"] * 3]
    for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
        device = topology_devices(topology)[0]
        found = cycles(device, PRODUCT)
        flops = 2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]
        share = flops / found / of_kind(CHIPS, device.device_kind).flops_per_cycle
        lines.append((device.device_kind, f"{found:,}", f"{share:.1%}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", default=[], metavar="NAME", help=f"all, or {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--reports", type=Path, default=ROOT / "runs" / "scaling")
    parser.add_argument("--fast", action="store_true", help="compile at optimization level O1")
    parser.add_argument("--products", action="store_true")
    args = parser.parse_args()
    names = list(CONFIGURATIONS) if args.run == ["all"] else args.run
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    if args.products:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        print(products())
        return
    failed = [name for name in names if not compile_one(name, args.reports, args.fast)]
    print(table(args.reports))
    if failed:
        sys.exit(f"did not compile, or does not fit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
