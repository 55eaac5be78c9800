"""Whole runs of ``python -m kimi_jax.train`` as a user starts them: resume after a kill, SIGTERM, bad input."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import pytest

from kimi_jax import train as train_command
from kimi_jax.training import loop
from tests import command_line
from tests.multiprocess.processes import losses, records

ROOT = Path(__file__).parents[2]

CONFIG = """
def get_config():
    return dict(
        model=dict(
            preset="tiny", hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        ),
        optimizer=dict(learning_rate=5e-3),
        schedule=dict(warmup_steps=2),
        steps=40, batch_size=4, seq_len=32, accumulation=2, eval_every=20, eval_batches=2, checkpoint_every=4,
        log_every=1, sample_tokens=4,
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


def command(config: Path, workdir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "kimi_jax.train", "--config", str(config), "--workdir", str(workdir), *overrides]


def train(config: Path, workdir: Path, *overrides: str, path: str = "") -> subprocess.CompletedProcess:
    env, line = {**os.environ, "PYTHONPATH": path}, command(config, workdir, *overrides)
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def train_here(config: Path, workdir: Path, *overrides: str) -> subprocess.CompletedProcess:
    with unittest.mock.patch.object(loop, "keep_freed_memory"):  # not in the process of all tests
        return command_line.run(train_command, *command(config, workdir, *overrides)[3:])


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"kimi_jax.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if len(records(workdir)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} not reached: exit code {process.poll()}")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    workdir, no_torch = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("no_torch")
    (no_torch / "torch.py").write_text(
        "raise AssertionError('torch takes seconds to import, and training has no use for it')"
    )
    done = train(config, workdir, path=str(no_torch))
    assert done.returncode == 0, done.stderr
    assert "order-2 byte model" in done.stdout and "sample:" in done.stdout
    assert (workdir / "curves.png").stat().st_size > 10_000
    assert list((workdir / "tensorboard").iterdir())
    return workdir


def test_every_step_is_recorded(uninterrupted):
    found = losses(uninterrupted)
    assert [step for step, _ in found] == list(range(1, 41))
    assert found[-1][1] < 0.8 * found[0][1]
    record = records(uninterrupted)[0]
    for name in ("bits_per_byte", "tokens_per_second", "flops_per_second", "mfu", "max_logit_per_layer",
                 "heads_clipped", "heads_ever_clipped", "load_imbalance", "update_rms", "grad_norm"):  # fmt: skip
        assert name in record


def test_kill_and_resume_gives_the_same_losses(config, uninterrupted, tmp_path):
    expected, rng = losses(uninterrupted), random.Random()
    moments = sorted(rng.sample(range(1, 39), 2))
    for moment in moments:
        process = subprocess.Popen(command(config, tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_for_step(process, tmp_path, moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = train(config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == expected, f"killed after steps {moments}"


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_resume(config, uninterrupted, tmp_path):
    process = subprocess.Popen(command(config, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for_step(process, tmp_path, 6)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "the same command resumes" in output
    done = train(config, tmp_path)
    assert done.returncode == 0 and "resuming" in done.stdout
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_finished_run_says_so(config, uninterrupted):
    (uninterrupted / "curves.png").unlink()  # as if killed after the last checkpoint
    done = train(config, uninterrupted)
    assert done.returncode == 0 and "already at step 40" in done.stderr
    assert (uninterrupted / "curves.png").stat().st_size > 10_000


def test_sigterm_in_the_last_step_lets_the_run_finish(config, uninterrupted, tmp_path, monkeypatch):
    def evaluate_and_stop(run):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run)

    evaluate = loop.Run.evaluate
    monkeypatch.setattr(loop.Run, "evaluate", evaluate_and_stop)
    done = train_here(config, tmp_path, "--config.steps=1")
    assert done.returncode == 0 and "SIGTERM" not in done.stdout and (tmp_path / "curves.png").exists()


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hidden_size=40", "(1, 40, 20)"),
        ("model.param_dtype=bfloat16", "has dtype float32, the config asks for bfloat16"),
        ("optimizer.name=adamw", "it was written with another model or optimizer"),
    ],
)
def test_checkpoint_of_another_run(config, uninterrupted, override, expected):
    done = train_here(config, uninterrupted, f"--config.{override}", "--config.steps=50")
    assert expected in one_line(done)


def test_non_finite_loss_stops_and_names_the_place(config, tmp_path):
    done = train(config, tmp_path, "--config.optimizer.learning_rate=1e30", "--config.checkpoint_every=1")
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert "step" in message and "batch" in message and "last good checkpoint" in message


@pytest.mark.slow
def test_non_finite_loss_can_be_skipped(config, tmp_path):
    done = train(config, tmp_path, "--config.optimizer.learning_rate=1e30", "--config.nonfinite=skip",
                 "--config.steps=8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--config.model.hiden_size=32"], "did you mean model.hidden_size"),
        (["--config.optimizer.lr=1"], "did you mean config.optimizer"),
        (["--config.stepz=3"], "did you mean config.steps"),
        (["--config.model.num_experts_per_tok=9"], "exceeds"),
        (["--config.model.qk_rope_head_dim=5"], "even"),
        (["--config.model.vocab_size=300"], "model.vocab_size"),
        (["--config.batch_size=5"], "accumulation"),
        (["--config.steps=many"], "config.steps must be int"),
        (["--config.data.sources=['/nonexistent/*.txt']"], "/nonexistent/*.txt"),
        (["--nonsense"], "--nonsense"),
        (["--config.KEY=5"], "stands for an entry"),
    ],
)
def test_bad_config(config, tmp_path, overrides, expected):
    assert expected in one_line(train_here(config, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_empty_corpus(config, tmp_path):
    (tmp_path / "empty.txt").touch()
    message = one_line(train_here(config, tmp_path / "run", f"--config.data.sources=['{tmp_path}/empty.txt']"))
    assert "empty.txt" in message or "no text" in message


def test_unwritable_workdir(config, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in one_line(train_here(config, tmp_path / "file" / "run"))


def test_help_has_examples():
    for module in ("train", "generate"):
        done = run_module(module, "--help")
        assert done.returncode == 0 and "examples:" in done.stdout


def test_generate_reads_the_run(uninterrupted):
    arguments = ["--checkpoint", str(uninterrupted), "--prompt", "def ", "--max-new-tokens", "5"]
    runs = [run_module("generate", *arguments) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.strip()
    missing = run_module("generate", "--checkpoint", str(uninterrupted / "absent"), "--prompt", "x")
    assert "absent" in one_line(missing)
