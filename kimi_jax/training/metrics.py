"""Where a run's numbers go: ``metrics.jsonl`` (every step), TensorBoard, and the terminal."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.checkpoint.safetensors_writer import write_bytes
from kimi_jax.errors import os_errors_as
from kimi_jax.training.board import Board

FILE, CURVES = "metrics.jsonl", "curves.png"


def read(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in ``metrics.jsonl``; a line cut short by a kill is not a record."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("kind") == kind:
                records.append(record)
    return records


def keep_until(path: Path, step: int) -> None:
    """Drops what lies after ``step``, so that a resumed run continues the file without gap or repetition."""
    if not path.exists():
        return
    kept = [r for kind in ("train", "eval") for r in read(path, kind) if r["step"] <= step]
    kept.sort(key=lambda record: record["step"])
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


class Writer:
    """Writes records as they come; progress is a bar on a terminal and plain lines elsewhere.

    A record that cannot be written ends the run: the next start would find a gap.
    """

    def __init__(self, workdir: Path, steps: int, start: int, log_every: int):
        from tqdm import tqdm

        self._workdir = workdir
        with os_errors_as(f"cannot write {workdir}"):
            self._file = open(workdir / FILE, "a", encoding="utf-8", buffering=1)
            self._board = Board(workdir / "tensorboard", start)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not terminal)
        self._plain, self._log_every, self._steps = not terminal, log_every, steps

    def train(self, record: dict[str, Any]) -> None:
        self._write("train", record)
        step = record["step"]
        line = (
            f"loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte  lr {record['learning_rate']:.2e}  "
            f"max logit {record['max_logit']:.1f}  {record['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update()
        if self._plain and (step % self._log_every == 0 or step in (1, self._steps)):
            print(f"step {step}/{self._steps}  {line}", flush=True)

    def eval(self, record: dict[str, Any]) -> None:
        self._write("eval", record)
        self.say(f"step {record['step']}  held-out {record['bits_per_byte']:.4f} bits/byte  loss {record['loss']:.4f}")

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        with os_errors_as(f"cannot write {self._workdir}"):
            self._file.write(json.dumps({"kind": kind, **record}) + "\n")
            if kind == "eval" or record["step"] % self._log_every == 0:
                numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
                del numbers["step"]
                self._board.add(record["step"], {f"{kind}/{name}": value for name, value in numbers.items()})

    def flush(self) -> None:
        """Lets all be on disk that was written."""
        with os_errors_as(f"cannot write {self._workdir}"):
            self._board.flush()

    def close(self) -> None:
        self._bar.close()
        with os_errors_as(f"cannot write {self._workdir}"), closing(self._board):
            self._file.close()


class Clock:
    """Seconds between calls."""

    def __init__(self):
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def load_imbalance(load_LE: np.ndarray) -> float:
    """Largest expert load over the mean, in the worst layer: 1 is perfect balance."""
    if not load_LE.size:
        return 1.0
    return float(np.max(load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)))


def plot(workdir: Path, tau: float | None) -> Path:
    """``curves.png``: loss, the largest attention logit, expert balance, learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, held_out = read(workdir / FILE, "train"), read(workdir / FILE, "eval")
    steps = [r["step"] for r in train]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    axes[0, 0].plot(steps, [r["bits_per_byte"] for r in train], lw=0.8, label="training")
    axes[0, 0].plot([r["step"] for r in held_out], [r["bits_per_byte"] for r in held_out], "o-", label="held out")
    axes[0, 0].set(title="bits per byte", xlabel="step")
    axes[0, 0].legend()
    axes[0, 1].plot(steps, [r["max_logit"] for r in train], lw=0.8)
    if tau is not None:
        axes[0, 1].axhline(tau, ls="--", color="grey", lw=0.8)
    axes[0, 1].set(title="largest attention logit (dashed: QK-Clip threshold)", xlabel="step", yscale="symlog")
    axes[1, 0].plot(steps, [r["load_imbalance"] for r in train], lw=0.8)
    axes[1, 0].set(title="largest expert load / mean", xlabel="step")
    axes[1, 1].plot(steps, [r["learning_rate"] for r in train], lw=0.8)
    axes[1, 1].set(title="learning rate", xlabel="step")
    path = workdir / CURVES
    part = path.with_suffix(".part")
    with os_errors_as(f"cannot write {path}"):
        figure.savefig(part, format="png", dpi=110)
        part.replace(path)
    plt.close(figure)
    return path
