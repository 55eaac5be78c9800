"""Two hosts die between checkpoints, one of them for good: the run goes on from what the other kept, bit for bit.

Both processes keep their files in one folder, under names that tell them apart: to remove those of a process is what
a replaced host is.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.multiprocess.processes import Launch, losses, write_config

pytestmark = pytest.mark.slow

STEPS = 24
MESH = ["--config.mesh.expert=2", "--config.mesh.fsdp=2"]  # every device has pieces that no other has


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = write_config(tmp_path_factory.mktemp("config"))
    text = path.read_text().replace("checkpoint_every=2", "checkpoint_every=100").replace("steps=12", f"steps={STEPS}")
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    launch = Launch(config, tmp_path_factory.mktemp("whole"), 2, 2, *MESH)
    assert launch.wait() == [0, 0], launch.said(0)
    return launch.workdir


def copying(folder: Path) -> list[str]:
    return [*MESH, f"--config.emergency.folder={folder}", "--config.emergency.every=2"]


def files(folder: Path, process: int) -> dict[int, Path]:
    """Step -> the file of this process."""
    found = folder.glob(f"*/*-{process}.safetensors")
    return {int(path.name.split("-")[0]): path for path in found}


def kill_both(config: Path, workdir: Path, folder: Path, step: int = 4) -> None:
    """When the copy of ``step``, or a later one, is complete on both."""
    launch = Launch(config, workdir, 2, 2, *copying(folder))
    deadline = time.monotonic() + 300
    while not all(max(files(folder, process), default=0) >= step for process in range(2)):
        assert all(process.poll() is None for process in launch.processes), launch.said(0)
        assert time.monotonic() < deadline, launch.said(0)
        time.sleep(0.005)
    for process in launch.processes:
        process.kill()
    launch.wait()
    assert len(losses(workdir)) < STEPS


def finish(config: Path, workdir: Path, folder: Path) -> Launch:
    launch = Launch(config, workdir, 2, 2, *copying(folder))
    assert launch.wait() == [0, 0], launch.said(0) + launch.said(1)
    assert [path.name for path in (workdir / "emergency").iterdir()] == ["history.json"]
    return launch


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory) -> Path:
    """A run with a checkpoint of step 2, killed after step 4 or later: read only."""
    root = tmp_path_factory.mktemp("killed")
    done = Launch(config, root / "run", 2, 2, *MESH, "--config.steps=2")
    assert done.wait() == [0, 0], done.said(0)
    kill_both(config, root / "run", root / "local")
    return root


@pytest.fixture
def left(killed, tmp_path) -> tuple[Path, Path]:
    """The workdir and the folder with the copies, as the kill left them."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run", tmp_path / "local"


def test_a_replaced_host_gets_its_pieces_from_the_others(config, uninterrupted, left):
    workdir, folder = left
    for path in files(folder, 1).values():
        path.unlink()
    newest = max(files(folder, 0))
    said = finish(config, workdir, folder).said(0)
    assert f"resuming {workdir} after step {newest} from the local copies in {folder}" in said
    assert losses(workdir) == losses(uninterrupted)
    assert list(folder.iterdir()) == []


def test_a_save_that_one_process_did_not_finish_is_not_taken(config, uninterrupted, left):
    """Only the one before is everywhere; the pieces of two starts do not mix."""
    workdir, folder = left
    kill_both(config, workdir, folder, 14)  # from the copies of the first start
    for path in folder.glob("*/*"):
        _, start, _ = path.name.split("-")
        assert start == json.loads((workdir / "emergency" / "history.json").read_text())["start"]
    both = set(files(folder, 0)) & set(files(folder, 1))
    for process in range(2):
        for step, path in files(folder, process).items():
            if step != min(both):
                _without_half(path)
    said = finish(config, workdir, folder).said(0)
    assert f"after step {min(both)} from the local copies" in said
    assert losses(workdir) == losses(uninterrupted)


def _without_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_when_a_piece_is_nowhere_the_run_goes_on_from_its_checkpoint(config, uninterrupted, left):
    workdir, folder = left
    for process in range(2):
        for path in files(folder, process).values():
            _without_half(path)
    said = finish(config, workdir, folder).said(0)
    assert "the local copies of step" in said and "are not used" in said
    assert f"resuming {workdir} after step 2\n" in said
    assert losses(workdir) == losses(uninterrupted)


def test_another_mesh_goes_on_from_the_checkpoint_and_says_why(config, left):
    workdir, folder = left
    launch = Launch(config, workdir, 2, 2, *copying(folder)[2:], "--config.mesh.expert=4")
    assert launch.wait() == [0, 0], launch.said(0)
    said = launch.said(0)
    assert "the local copies of step" in said and "pieces are missing, such as" in said
    assert f"resuming {workdir} after step 2\n" in said
    assert [step for step, _ in losses(workdir)] == list(range(1, STEPS + 1))
