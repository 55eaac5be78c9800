"""What is compared before a start, and what is found to be different."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from kimi_jax.errors import UserError
from kimi_jax.pods import preflight


class Device(NamedTuple):
    process_index: int
    device_kind: str


def name(process: int) -> str:
    return f"process {process} (host{process})"


def test_facts_name_every_entry_of_the_config():
    found = preflight.facts({"steps": 3, "model": {"hidden_size": 8, "dims": (1, 2)}}, Path("runs/a"))
    assert found["config.steps"] == "3" and found["config.model.hidden_size"] == "8"
    assert found["config.model.dims"] == "(1, 2)"
    assert found["version of jax"] == jax.__version__ and found["--workdir"] == "runs/a"
    assert preflight.facts({}, Path("a")) == preflight.facts({}, Path("a"))


def test_equal_devices_pass():
    preflight.check_devices([Device(process, "TPU v5p") for process in range(4) for _ in range(4)], name)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([*[Device(0, "v5p")] * 4, *[Device(1, "v5p")] * 4, *[Device(2, "v5p")] * 3], r"process 2 .*3 x v5p.* 4 x v5p"),
        ([*[Device(0, "v5p")] * 4, *[Device(1, "v6e")] * 4], r"process 1 \(host1\) has 4 x v6e, elsewhere .* 4 x v5p"),
        ([Device(0, "v5p"), Device(0, "cpu"), Device(1, "v5p"), Device(1, "v5p")], "process 1 .*2 x v5p, elsewhere"),
    ],
)
def test_different_devices_are_named(devices, message):
    with pytest.raises(UserError, match=message):
        preflight.check_devices(devices, name)


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
    preflight.check_workdir(tmp_path / "new", "mark", lambda: None, name(0))
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with pytest.raises(UserError, match=r"process 3 \(host3\) does not see .* shared folder"):
        preflight.check_workdir(tmp_path / "own", "mark", lambda: None, name(3))


def test_a_sum_over_one_process():
    preflight.check_collective(jax.devices())
