"""python -m kimi_jax.train: pre-training and fine-tuning. ``--help`` has examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kimi_jax import cli

PROG = "python -m kimi_jax.train"
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "debug.py"
EXAMPLES = f"""\
  {PROG} --workdir runs/demo                          the embedded example: a small model on Python's own source
  {PROG} --workdir runs/demo                          again: resumes, or says that it is done
  {PROG} --config configs/debug.py --workdir runs/a --config.steps=50 --config.optimizer.name=adamw
  {PROG} --workdir runs/mine --config.data.sources='["corpus/*.txt"]' --config.model.hidden_size=192
  {PROG} --workdir /shared/a --coordinator host0:8476 --process 0 --processes 2     and --process 1 on the other host
"""


def main() -> None:
    parser = cli.Parser(
        PROG, "Trains a model as its config file says; the same command resumes a run that was stopped.", EXAMPLES
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="defines get_config()")
    parser.add_argument("--config.KEY", metavar="VALUE", help="overrides one entry of the config, at any depth")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, metrics and curves go here")
    parser.add_processes()
    args, overrides = parser.parse_with_overrides()

    from kimi_jax.pods import cluster, session
    from kimi_jax.training import config, loop

    cfg = config.load(args.config, overrides)
    told = cluster.Told(args.coordinator, args.process, args.processes)
    with session.joined(PROG, told, cfg.pods, dataclasses.asdict(cfg), args.workdir) as run:
        loop.train(cfg, args.workdir, run)


if __name__ == "__main__":
    cli.run(PROG, main)
