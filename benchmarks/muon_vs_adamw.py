"""How many steps does Muon need to reach AdamW's final loss?

    python benchmarks/muon_vs_adamw.py [--workdir runs/muon_vs_adamw]

The debug model on the embedded corpus, each optimizer at each learning rate of its grid; the best held-out result of
either counts. Prints the grid and the ratio of steps: the first step at which Muon's training loss, averaged over 20
steps, is down to AdamW's at its end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRID = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muon_clip": (2.5e-3, 5e-3, 1e-2, 2e-2)}


def run(workdir: Path, name: str, rate: float, steps: int) -> tuple[list[dict], float]:
    from kimi_jax.training import metrics

    folder = workdir / f"{name}_{rate}"
    if not (folder / "curves.png").exists():
        tokens = steps * 4096
        command = [sys.executable, "-m", "kimi_jax.train", "--workdir", str(folder), f"--config.steps={steps}"]
        command += [f"--config.optimizer.name={name}", f"--config.optimizer.learning_rate={rate}"]
        command += [f"--config.schedule.stable_tokens={tokens // 2}", f"--config.schedule.decay_tokens={tokens // 2}"]
        command += ["--config.eval_every=100000", "--config.checkpoint_every=100000", "--config.sample_tokens=1"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    records = metrics.read(folder / metrics.FILE)
    return records, metrics.read(folder / metrics.FILE, "eval")[-1]["bits_per_byte"]


def smoothed(records: list[dict], width: int = 20) -> list[float]:
    values = [r["loss"] for r in records]
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/muon_vs_adamw"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    best: dict[str, tuple[float, float, list[dict]]] = {}
    for name, rates in GRID.items():
        for rate in rates:
            records, held_out = run(args.workdir.absolute(), name, rate, args.steps)
            print(f"{name:10} rate {rate:<8} held-out {held_out:.4f} bits/byte", flush=True)
            best[name] = min(best.get(name, (9e9, 0.0, [])), (held_out, rate, records), key=lambda entry: entry[0])
    goal = smoothed(best["adamw"][2])[-1]
    reached = next((i + 1 for i, loss in enumerate(smoothed(best["muon_clip"][2])) if loss <= goal), None)
    (adamw, adamw_rate, _), (muon, muon_rate, _) = best["adamw"], best["muon_clip"]
    print(f"AdamW at {adamw_rate}: training loss {goal:.4f} after {args.steps} steps, held-out {adamw:.4f}")
    if reached is None:
        print("Muon does not reach it")
    else:
        share = reached / args.steps
        print(f"Muon at {muon_rate}: there after {reached} steps, {share:.2f} of AdamW's; held-out {muon:.4f}")


if __name__ == "__main__":
    main()
