"""python -m kimi_jax.aot: compiles a training step for a TPU slice that is not there. ``--help`` has examples."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from kimi_jax import cli

PROG = "python -m kimi_jax.aot"
EXAMPLES = f"""\
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x8
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x16 --config.mesh.fsdp=16 --json report.json
  {PROG} --config configs/kimi_k2_1t.py --topology v5p:8x8x8 --config.model.num_hidden_layers=4 --fast --dump-hlo hlo
"""


def main() -> None:
    parser = cli.Parser(PROG, "Says whether a config's training step compiles for a TPU slice and fits.", EXAMPLES)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="defines get_config()")
    parser.add_argument("--config.KEY", metavar="VALUE", help="overrides one entry of the config, at any depth")
    parser.add_argument("--topology", required=True, help="as libtpu names it: v5p:8x8x8, v6e:16x16, tpu7x:4x4x8")
    parser.add_argument("--fast", action="store_true", help="compile at optimization level O1: half the time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    parser.add_argument("--dump-hlo", type=Path, metavar="DIR", help="also write the compiled program here, as text")
    args, overrides = parser.parse_known_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    from kimi_jax.errors import UserError
    from kimi_jax.training import ahead, config

    if args.fast:
        jax.config.update("jax_optimization_level", "O1")
    cfg = config.load(args.config, overrides)
    report, compiled = ahead.compile_step(cfg, args.topology)
    print(ahead.table(report), flush=True)
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(report), indent=2))
    if compiled is None:
        raise UserError(
            f"the step needs {report.peak_gib:.1f} of {report.hbm_gib:.1f} GiB: use fewer sequences per device "
            "(batch_size, accumulation), model.remat=full, or more devices"
        )
    if args.dump_hlo:
        args.dump_hlo.mkdir(parents=True, exist_ok=True)
        (args.dump_hlo / "train.hlo.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    cli.run(PROG, main)
