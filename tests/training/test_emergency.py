"""A killed run goes on from the copies on its own host, bit for bit; what cannot be used is said in one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.test_run import CONFIG, ROOT, command, losses, one_line, train, train_here

EVERY = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG.replace("steps=40", "steps=24").replace("checkpoint_every=4", "checkpoint_every=10"))
    return path


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    done = train(config, workdir)
    assert done.returncode == 0, done.stderr
    assert not (workdir / "emergency").exists()
    return workdir


def copies_in(folder: Path) -> str:
    return f"--config.emergency.folder={folder}"


def files(folder: Path, step: int) -> list[Path]:
    return list(folder.glob(f"*/{step}-*.safetensors"))


def kill_when_copied(config: Path, workdir: Path, folder: Path, step: int, sign: int = signal.SIGKILL) -> str:
    """What the run said that was ended when the copy of ``step`` was complete."""
    arguments = command(config, workdir, copies_in(folder), f"--config.emergency.every={EVERY}")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not files(folder, step):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(sign)
    return process.communicate(timeout=100)[0]


def resumed_at(said: str) -> int:
    (line,) = [line for line in said.splitlines() if line.startswith("resuming")]
    return int(line.split("after step ")[1].split()[0])


@pytest.mark.slow
def test_kills_between_checkpoints_give_the_same_losses(config, uninterrupted, tmp_path):
    """Before the first checkpoint, and after one, from a start that itself went on from a copy."""
    workdir, folder = tmp_path / "run", tmp_path / "local"
    kill_when_copied(config, workdir, folder, 6)
    said = kill_when_copied(config, workdir, folder, 15)
    assert f"from the local copies in {folder}" in said and resumed_at(said) >= 6
    assert len(list(folder.glob("*/*"))) <= 3  # two copies, and one that was under way
    done = train(config, workdir, copies_in(folder), f"--config.emergency.every={EVERY}")
    assert done.returncode == 0, done.stderr
    assert f"from the local copies in {folder}" in done.stdout and resumed_at(done.stdout) >= 15
    assert losses(workdir) == losses(uninterrupted)
    assert list(folder.iterdir()) == []  # the last checkpoint makes them useless


@pytest.mark.slow
def test_damaged_copies_and_those_of_another_run_are_not_used(config, uninterrupted, tmp_path):
    workdir, folder = tmp_path / "run", tmp_path / "local"
    assert train(config, workdir, "--config.steps=10").returncode == 0
    kill_when_copied(config, workdir, folder, 15)
    for path in folder.glob("*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    kill_when_copied(config, tmp_path / "another", folder, 6)
    done = train(config, workdir, copies_in(folder))
    assert done.returncode == 0, done.stderr
    assert "are not used: 1 of " in done.stdout and resumed_at(done.stdout) == 10
    assert losses(workdir) == losses(uninterrupted)
    done = train(config, tmp_path / "another", copies_in(folder))
    assert resumed_at(done.stdout) >= 6 and losses(tmp_path / "another") == losses(uninterrupted)


@pytest.mark.slow
def test_a_new_run_in_a_workdir_that_was_deleted_begins_anew(config, uninterrupted, tmp_path):
    workdir, folder = tmp_path / "run", tmp_path / "local"
    kill_when_copied(config, workdir, folder, 6)
    subprocess.run(["rm", "-r", workdir], check=True)
    done = train(config, workdir, copies_in(folder))
    assert done.returncode == 0 and "resuming" not in done.stdout
    assert losses(workdir) == losses(uninterrupted)


@pytest.mark.slow
def test_a_start_without_copies_makes_the_old_ones_void(config, tmp_path):
    workdir, folder = tmp_path / "run", tmp_path / "local"
    kill_when_copied(config, workdir, folder, 6)
    assert train(config, workdir, "--config.steps=2").returncode == 0
    assert files(folder, 6)
    assert resumed_at(train(config, workdir, copies_in(folder), "--config.steps=12").stdout) == 2


@pytest.mark.slow
def test_sigterm_after_a_copy_saves_a_checkpoint(config, uninterrupted, tmp_path):
    workdir, folder = tmp_path / "run", tmp_path / "local"
    said = kill_when_copied(config, workdir, folder, 6, signal.SIGTERM)
    step = int(said.split("saved after step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir() and list(folder.iterdir()) == []
    done = train(config, workdir, copies_in(folder))
    assert resumed_at(done.stdout) == step and losses(workdir) == losses(uninterrupted)


FULL_DISK = """
import errno, os
def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.posix_fallocate = full
from kimi_jax import cli, train
cli.run(train.PROG, train.main)
"""


@pytest.mark.slow
def test_a_full_disk_is_said_once_and_training_goes_on(config, uninterrupted, tmp_path):
    """Room is reserved by one call, which nothing else makes."""
    arguments = command(config, tmp_path / "run", copies_in(tmp_path / "local"), f"--config.emergency.every={EVERY}")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments[3:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no local copy of step") == 1 and "No space left" in done.stderr
    assert losses(tmp_path / "run") == losses(uninterrupted)


def test_bad_settings(config, tmp_path):
    (tmp_path / "file").touch()
    message = one_line(train_here(config, tmp_path / "run", copies_in(tmp_path / "file")))
    assert f"cannot write {tmp_path}/file" in message and not (tmp_path / "run").exists()
    assert "emergency.every" in one_line(train_here(config, tmp_path / "run", "--config.emergency.every=0"))
