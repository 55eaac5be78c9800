"""generate and serve on two processes with two devices each, against one process with one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from kimi_jax import presets
from tests.checkpoint.examples import random_tensors, save_hf
from tests.multiprocess.processes import free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
MODEL = presets.tiny().replace(
    vocab_size=512, hidden_size=16, intermediate_size=24, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=3, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=10, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
)  # fmt: skip
PROMPTS = [
    {"prompt": "def main(", "max_tokens": 9},
    {"prompt": "import ", "max_tokens": 9, "temperature": 0.8, "seed": 3, "n": 2},
    {"prompt": "class Foo:\n    def __init__(self", "max_tokens": 9},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    save_hf(folder / "hf", {name: w * 0.5 for name, w in random_tensors(MODEL).items()}, MODEL)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return folder


def start(folder: Path, what: str, processes: int, *arguments: str) -> list[subprocess.Popen]:
    port, found = free_port(), []
    for i in range(processes):
        several = ["--coordinator", f"localhost:{port}", "--process", str(i), "--processes", str(processes)]
        flags = f"--xla_force_host_platform_device_count={processes} --xla_backend_optimization_level=0"
        command = [sys.executable, "-m", f"kimi_jax.{what}", "--checkpoint", str(folder / "hf"), "--tokenizer", "bytes"]
        command += [*arguments, "--dtype", "float32", *(several if processes > 1 else [])]
        env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        found.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    return found


@pytest.mark.slow
def test_a_batch_is_answered_as_by_one(folder):
    for processes, to in ((1, "one.jsonl"), (2, "two.jsonl")):
        files = ("--batch", str(folder / "prompts.jsonl"), "--output", str(folder / to))
        for process in start(folder, "generate", processes, *files):
            assert process.wait(300) == 0, process.stderr and process.stderr.read()
    assert (folder / "two.jsonl").read_text() == (folder / "one.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGTERM to all", "a process is killed"])
def test_process_0_answers_for_both(folder, end):
    port = free_port()
    limits = ("--max-model-len", "64", "--cache-tokens", "1024", "--max-rows", "4")
    first, second = start(folder, "serve", 2, "--port", str(port), *limits)
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url, first)
    ask = {"model": "kimi_jax", "prompt": "def main(", "max_tokens": 5, "temperature": 0}
    texts = {httpx.post(url + "/v1/completions", json=ask, timeout=300).json()["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 1
    if end == "SIGTERM to all":
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
        assert [first.wait(120), second.wait(120)] == [0, 0]
    else:
        second.kill()
        assert first.wait(120) == 1
        assert first.stderr and "process 1" in first.stderr.read().splitlines()[-1]
