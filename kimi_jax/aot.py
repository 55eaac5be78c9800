"""python -m kimi_jax.aot: compiles a step for a TPU slice that is not there. ``--help`` has examples."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kimi_jax import cli
from kimi_jax.errors import UserError, os_errors_as

PROG = "python -m kimi_jax.aot"
EXAMPLES = f"""\
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x8
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x16 --config.mesh.fsdp=8 --json report.json
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x8 --slices 2     # mesh.data between the slices
  {PROG} --config configs/kimi_k2_1t.py --topology tpu7x:4x8x8 --sweep 3    # compiles the best 3 of all choices
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x8 --config.model.num_hidden_layers=4 --fast --dump-hlo hlo
  {PROG} --config configs/kimi_k2_1t.py --topology tpu7x:2x2x4 --phase decode --rows 128 --past 1536
  {PROG} --config configs/kimi_k2_1t.py --topology v6e:8x8 --phase prefill --rows 64 --past 4096 --weights int8

exits 0 if the step compiles and fits, 1 if not, 2 for a wrong command line. docs/scaling.md explains the figures.
"""


def main() -> None:
    parser = cli.Parser(PROG, "Says whether a config's step compiles for a TPU slice and fits.", EXAMPLES)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="defines get_config()")
    parser.add_argument("--config.KEY", metavar="VALUE", help="overrides one entry of the config, at any depth")
    parser.add_argument("--topology", required=True, help="as libtpu names it: v5p:8x8x8, v6e:16x16, tpu7x:4x4x8")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="that many of it, data between them (1)")
    parser.add_argument("--phase", choices=("train", "prefill", "decode"), default="train")
    parser.add_argument("--sweep", type=int, metavar="N", help="rank meshes, batch and remat; compile the best N")
    parser.add_argument("--fast", action="store_true", help="compile at optimization level O1: half the time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    parser.add_argument("--dump-hlo", type=Path, metavar="DIR", help="also write the compiled program here, as text")
    served = parser.add_argument_group("prefill and decode")
    served.add_argument("--rows", type=int, default=128, metavar="N", help="requests in a step, of the slice (128)")
    served.add_argument("--past", type=int, default=1536, metavar="N", help="tokens of each in the cache (1536)")
    served.add_argument("--width", type=int, default=128, metavar="N", help="prefill: new tokens of each (128)")
    served.add_argument("--weights", choices=("bf16", "fp8", "int8"), default="fp8", help="on the devices (fp8)")
    served.add_argument(
        "--cache-dtype", choices=cli.CACHE_DTYPES, default="bfloat16", help="of the latent cache (bfloat16)"
    )
    args, overrides = parser.parse_with_overrides()
    if args.phase != "train" and (args.sweep is not None or args.slices != 1):
        parser.error("--sweep and --slices are for training")
    if min(args.rows, args.past, args.width) < 1:
        parser.error("--rows, --past and --width must be at least 1")
    if args.sweep is not None and (args.sweep < 1 or args.dump_hlo):
        parser.error("--sweep takes a number from 1 on, and no --dump-hlo")
    for path in (args.json, args.dump_hlo and args.dump_hlo / "program"):
        if path:
            _check_writable(path)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    from kimi_jax.ahead.topology import topology_devices
    from kimi_jax.training import config

    if args.fast:
        jax.config.update("jax_optimization_level", "O1")
    cfg = config.load(args.config, overrides)
    devices = topology_devices(args.topology, args.slices)
    if args.phase != "train":
        _served(args, cfg, devices)
    elif args.sweep:
        _sweep(args, overrides, cfg, devices)
    else:
        _one(args, cfg, devices)


def _one(args: Any, cfg: Any, devices: list[Any]) -> None:
    from kimi_jax.ahead.report import compile_step
    from kimi_jax.ahead.sweep import would_fit
    from kimi_jax.ahead.table import table

    report, text = compile_step(cfg, devices, args.topology, args.slices)
    print(table(report), flush=True)
    if args.json:
        _write(args.json, json.dumps(dataclasses.asdict(report), indent=2))
    if text is None:
        choices = "; or ".join(would_fit(cfg, devices, report, args.slices))
        needs = f"the step needs {report.peak_gib:.1f} of {report.hbm_gib:.1f} GiB"
        raise UserError(f"{needs}; what would fit, by estimate: {choices}")
    if args.dump_hlo:
        _write(args.dump_hlo / "train.hlo.txt", text)


def _served(args: Any, cfg: Any, devices: list[Any]) -> None:
    from kimi_jax.ahead.serving import ROOM, Serving, compile_serving
    from kimi_jax.ahead.serving_table import serving_table

    model, width = cfg.model.replace(dtype="bfloat16"), 1 if args.phase == "decode" else args.width
    it = Serving(model, args.phase, args.rows, args.past, width, args.weights, args.cache_dtype)
    report, text = compile_serving(it, devices, args.topology)
    print(serving_table(report), flush=True)
    if args.json:
        _write(args.json, json.dumps(dataclasses.asdict(report), indent=2))
    if text is None:
        needs = f"the step needs {report.peak_gib:.1f} of {report.hbm_gib:.1f} GiB"
        ways = [f"{report.most_rows} rows"] if report.most_rows else []
        ways += ["a smaller --width"] if width > 1 else []
        # Every device computes the activations of all tokens.
        ways += ["more devices"] if width == 1 or report.temporaries_gib < ROOM * report.hbm_gib else []
        ways += ["--weights fp8"] if args.weights == "bf16" else []
        raise UserError(f"{needs}; what would fit: {', or '.join(ways)}")
    if args.dump_hlo:
        _write(args.dump_hlo / f"{args.phase}.hlo.txt", text)


def _sweep(args: Any, overrides: list[str], cfg: Any, devices: list[Any]) -> None:
    from kimi_jax.ahead.sweep import choices
    from kimi_jax.ahead.table import ranking

    found = choices(cfg, devices, args.slices)
    print(f"{len(found)} choices fit by estimate; compiling the best {min(args.sweep, len(found))}", flush=True)
    reports = []
    for choice in found[: args.sweep]:
        print(
            f"{choice}: by estimate {choice.estimate.gib:.1f} GiB, {choice.estimate.seconds:.3g} s a step", flush=True
        )
        report = _in_a_process(args, [*overrides, *(f"--config.{override}" for override in choice.overrides)])
        reports += [report] if report else []
    reports.sort(key=lambda r: (not r["fits"], r["compiled"]["seconds_per_token"] if r["fits"] else r["peak_gib"]))
    if reports:
        print(f"\n{ranking(reports)}", flush=True)
    if args.json:
        _write(args.json, json.dumps(reports, indent=2))
    if not any(report["fits"] for report in reports):
        raise UserError("none of these choices compiles and fits: compile more (--sweep), or use more devices")


def _in_a_process(args: Any, overrides: list[str]) -> dict[str, Any] | None:
    """The report on one choice, from a process of its own: an error inside libtpu ends that one alone."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "report.json"
        command = [sys.executable, "-m", "kimi_jax.aot", "--config", str(args.config), "--topology", args.topology]
        command += ["--slices", str(args.slices), *(["--fast"] if args.fast else []), "--json", str(to), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if to.exists():
            return json.loads(to.read_text(encoding="utf-8"))
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        print(f"  not compiled: {said}", flush=True)
        return None


def _check_writable(path: Path) -> None:
    """Before minutes of compiling, not after them."""
    with os_errors_as(f"cannot write to {path.parent}, choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    cli.run(PROG, main)
