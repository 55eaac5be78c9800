"""Commands in processes of this machine: ``kimi_jax.train`` on several, with virtual devices, over gloo; servers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from kimi_jax.checkpoint.manager import restore_params

ROOT = Path(__file__).parents[2]
STEPS = 12

CONFIG = """
def get_config():
    return dict(
        model=dict(
            preset="tiny", hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, dtype="float32", vocab_size=512,
        ),
        data=dict(sources=[{corpus!r}], holdout=0.3),
        optimizer=dict(learning_rate=2e-3, ns_dtype="float32"),
        schedule=dict(warmup_steps=2),
        pods=dict(start_seconds=100, heartbeat_seconds=60),
        steps={steps}, batch_size=8, seq_len=32, eval_every=100, eval_batches=1, checkpoint_every=2, log_every=1,
        sample_tokens=4,
    )
"""


def write_config(folder: Path) -> Path:
    """A corpus of twelve small texts, and a config that trains on it."""
    (folder / "corpus").mkdir()
    for i in range(12):
        words = [f"w{(i * 7 + k * k) % 53}" for k in range(400)]
        (folder / "corpus" / f"{i}.txt").write_text(" ".join(words))
    path = folder / "config.py"
    path.write_text(CONFIG.format(corpus=str(folder / "corpus"), steps=STEPS))
    return path


class Launch:
    """Processes that were started together; what each says goes to a file."""

    def __init__(self, config: Path, workdir: Path, processes: int, devices: int, *overrides: str, only=None):
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir, self.port = workdir, free_port()
        self.outputs = [workdir / f"output-{i}-{self.port}.txt" for i in range(processes)]
        self.processes: list[subprocess.Popen] = []
        for i in range(processes) if only is None else only:
            several = ["--coordinator", f"localhost:{self.port}", "--process", str(i), "--processes", str(processes)]
            self.start(config, i, devices, *(several if processes > 1 else []), *overrides)

    def start(self, config: Path, i: int, devices: int, *arguments: str) -> None:
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        command = [sys.executable, "-m", "kimi_jax.train", "--config", str(config), "--workdir", str(self.workdir)]
        with open(self.outputs[i], "w") as output:
            self.processes.append(
                subprocess.Popen(
                    [*command, *arguments],
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                )
            )

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            if any(found >= step for found, _ in losses(self.workdir)):
                return
            time.sleep(0.02)
        said = "\n".join(self.said(i) for i in range(len(self.processes)))
        for process in self.processes:
            process.kill()
        raise AssertionError(f"step {step} was not reached:\n{said}")

    def said(self, i: int) -> str:
        return self.outputs[i].read_text()

    def last_line(self, i: int) -> str:
        return self.said(i).strip().splitlines()[-1]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def wait_until_ready(url: str, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server did not start: {process.stderr and process.stderr.read()}"
        try:
            httpx.get(url + "/ready")
            return
        except httpx.TransportError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(f"{url} does not answer after {seconds} s")


def records(workdir: Path, kind: str = "train") -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in found if record["kind"] == kind]


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(workdir)]


def params(workdir: Path):
    return restore_params(workdir)[0]
