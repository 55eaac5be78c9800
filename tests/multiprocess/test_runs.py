"""Several processes give what one gives; they stop, die and go on together, also as another number of processes."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.multiprocess.processes import STEPS, Launch, losses, params, records, write_config

slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """The run on one device, without interruption."""
    launch = Launch(config, tmp_path_factory.mktemp("alone"), 1, 1)
    assert launch.wait() == [0], launch.said(0)
    return launch.workdir


@dataclass
class Chain:
    """One run in three starts: two processes of which one is killed, two of which one is told to stop, one."""

    killed: Launch
    seconds: float  # from the kill to the end of the other
    stopped: Launch
    finished: Launch


@pytest.fixture(scope="module")
def chain(config, tmp_path_factory) -> Chain:
    workdir = tmp_path_factory.mktemp("chain")
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.expert=2", "--config.mesh.context=2"]
    killed = Launch(config, workdir, 2, 4, *mesh)
    killed.wait_for_step(3)
    killed.processes[1].kill()
    began = time.monotonic()
    killed.wait()
    seconds = time.monotonic() - began
    stopped = Launch(config, workdir, 2, 4, *mesh)
    stopped.wait_for_step(6)
    stopped.processes[1].send_signal(signal.SIGTERM)
    stopped.wait()
    finished = Launch(config, workdir, 1, 4, "--config.mesh.fsdp=4")
    finished.wait()
    return Chain(killed, seconds, stopped, finished)


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_says_why(chain):
    assert chain.killed.processes[0].returncode == 1
    assert "process 1 (" in chain.killed.last_line(0) and ") died at step " in chain.killed.last_line(0)
    assert chain.seconds < 60


@pytest.mark.slow
def test_when_one_is_told_to_stop_both_stop_after_the_same_step(chain):
    said = [chain.stopped.said(i) for i in range(2)]
    assert [process.returncode for process in chain.stopped.processes] == [0, 0], said
    assert "resuming" in said[0] and "SIGTERM: saved after step" in said[0]
    assert "SIGTERM" not in said[1] and "step" not in said[1]  # one process reports
    step = int(said[0].split("saved after step ")[1].split(";")[0])
    assert 6 < step < STEPS
    assert f"after step {step}" in chain.finished.said(0)


@pytest.mark.slow
def test_the_losses_are_those_of_one_process(chain, alone):
    assert chain.finished.processes[0].returncode == 0, chain.finished.said(0)
    assert_same_run(chain.finished.workdir, alone)


def assert_same_run(workdir: Path, alone: Path) -> None:
    found, wanted = losses(workdir), losses(alone)
    assert [step for step, _ in found] == [step for step, _ in wanted] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in wanted], rtol=1e-6)
    for kind in ("train", "eval"):
        for name in ("loss", "bits_per_byte"):
            theirs, ours = ([record[name] for record in records(w, kind)] for w in (alone, workdir))
            np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params(workdir), params(alone))


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (2, 2, ["--config.mesh.expert=2"]),
        slow(2, 4, ["--config.mesh.expert=4"]),
        slow(2, 4, ["--config.mesh.context=8"]),  # both processes hold every row
        slow(4, 2, ["--config.mesh.fsdp=4", "--config.mesh.tensor=2"]),
        slow(4, 2, ["--config.mesh.expert=2", "--config.mesh.context=4"]),
    ],
)
def test_every_mesh_gives_the_run_of_one_device(config, alone, tmp_path, processes, devices, mesh):
    launch = Launch(config, tmp_path, processes, devices, *mesh)
    assert launch.wait() == [0] * processes, launch.said(0)
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_eight_devices_then_four_then_two_processes(config, alone, tmp_path):
    for steps, (processes, devices) in zip((4, 8, STEPS), ((1, 8), (1, 4), (2, 4)), strict=True):
        launch = Launch(config, tmp_path, processes, devices, "--config.mesh.fsdp=4", f"--config.steps={steps}")
        assert launch.wait() == [0] * processes, launch.said(0)
    found, wanted = losses(tmp_path), losses(alone)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.slow
def test_when_process_0_is_killed_the_others_end_and_say_why(config, tmp_path):
    launch = Launch(config, tmp_path, 2, 4, "--config.mesh.fsdp=4")
    launch.wait_for_step(2)
    launch.processes[0].kill()
    assert launch.wait(60)[1] == 1
    assert "process 0 (" in launch.last_line(1) and "died" in launch.last_line(1)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_by_all_with_their_stacks(config, tmp_path):
    """SIGSTOP stands for a host that does not come back; the step of the others then does not end."""
    limits = ["--config.pods.hang_seconds=60", "--config.pods.heartbeat_seconds=300"]
    launch = Launch(config, tmp_path, 2, 4, "--config.mesh.fsdp=4", *limits)
    launch.wait_for_step(2)
    launch.processes[1].send_signal(signal.SIGSTOP)
    assert launch.processes[0].wait(200) == 1
    launch.processes[1].kill()
    said = launch.said(0)
    assert "has not ended within 60 s" in launch.last_line(0) and "but silent" in launch.last_line(0)
    assert "process 1 (" in launch.last_line(0).split("but silent")[0]
    assert "Thread" in said and "training/loop.py" in said
