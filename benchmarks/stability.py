"""Does QK-Clip hold the attention logits, and does it cost anything?

    python benchmarks/stability.py [--workdir runs/stability]

The same small model, data and seed twice, at a learning rate at which plain Muon's attention logits run away: once
without the clip, once with it. Writes ``stability.png`` and prints both maxima and losses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = [  # no warm-up damping, no decay: growth of the query and key weights is what is to be seen
    "--config.schedule.warmup_steps=20",
    "--config.optimizer.weight_decay=0.0",
    "--config.eval_every=100000",
    "--config.checkpoint_every=100000",
    "--config.sample_tokens=1",
]


def run(workdir: Path, steps: int, rate: float, tau: float | None) -> list[dict]:
    from kimi_jax.training import metrics

    if not (workdir / "curves.png").exists():
        command = [sys.executable, "-m", "kimi_jax.train", "--workdir", str(workdir), f"--config.steps={steps}"]
        command += [*SETTINGS, f"--config.optimizer.learning_rate={rate}", f"--config.optimizer.tau={tau}"]
        subprocess.run(command, check=True, cwd=ROOT)
    return metrics.read(workdir / metrics.FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/stability"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--tau", type=float, default=100.0)
    args = parser.parse_args()
    free = run(args.workdir.absolute() / "free", args.steps, args.rate, None)
    clipped = run(args.workdir.absolute() / "clipped", args.steps, args.rate, args.tau)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, records in (("without QK-Clip", free), ("with QK-Clip", clipped)):
        steps = [r["step"] for r in records]
        left.plot(steps, [r["max_logit"] for r in records], label=name, lw=0.9)
        right.plot(steps, [r["bits_per_byte"] for r in records], label=name, lw=0.9)
        last = records[-50:]
        loss = sum(r["bits_per_byte"] for r in last) / len(last)
        print(
            f"{name:16} largest logit {max(r['max_logit'] for r in records):8.1f}   last 50 steps {loss:.4f} bits/byte"
        )
    left.axhline(args.tau, ls="--", color="grey", lw=0.8)
    left.set(title="largest attention logit", xlabel="step", yscale="log")
    right.set(title="training bits per byte", xlabel="step")
    right.legend()
    path = args.workdir / "stability.png"
    figure.savefig(path, dpi=110)
    print(f"curves: {path}")


if __name__ == "__main__":
    main()
