"""python -m kimi_jax.train: pre-training and fine-tuning. ``--help`` has examples."""

from __future__ import annotations

from pathlib import Path

from kimi_jax import cli

PROG = "python -m kimi_jax.train"
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "debug.py"
EXAMPLES = f"""\
  {PROG} --workdir runs/demo                          the embedded example: a small model on Python's own source
  {PROG} --workdir runs/demo                          again: resumes, or says that it is done
  {PROG} --config configs/debug.py --workdir runs/a --config.steps=50 --config.optimizer.name=adamw
  {PROG} --workdir runs/mine --config.data.sources='["corpus/*.txt"]' --config.model.hidden_size=192
"""


def main() -> None:
    parser = cli.Parser(
        PROG, "Trains a model as its config file says; the same command resumes a run that was stopped.", EXAMPLES
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="defines get_config()")
    parser.add_argument("--config.KEY", metavar="VALUE", help="overrides one entry of the config, at any depth")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, metrics and curves go here")
    args, overrides = parser.parse_known_args()

    from kimi_jax.training import config, loop

    loop.train(config.load(args.config, overrides), args.workdir)


if __name__ == "__main__":
    cli.run(PROG, main)
