"""A run that could not work does not start, and every process says which one is missing or different."""

from __future__ import annotations

import pytest

from tests.multiprocess.processes import Launch, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


def test_a_missing_process_is_named(config, tmp_path):
    launch = Launch(config, tmp_path, 3, 1, "--config.pods.start_seconds=3", only=(1, 2))
    assert launch.wait(100) == [1, 1]
    for i in (1, 2):
        assert launch.said(i).count("\n") == 1
        assert f"process 0 did not answer at localhost:{launch.port} within 3 s" in launch.said(i)


def test_a_missing_process_is_named_by_the_coordinator(config, tmp_path):
    launch = Launch(config, tmp_path, 3, 1, "--config.pods.start_seconds=8", only=(0, 2))
    assert launch.wait(100) == [1, 1]
    for i in (0, 2):
        assert launch.said(i).count("\n") == 1
        assert "process 1 of 3 did not come within 8 s" in launch.said(i)


def test_another_config_is_named(config, tmp_path):
    launch = Launch(config, tmp_path, 2, 1, "--config.batch_size=2", only=(1,))
    several = ["--coordinator", f"localhost:{launch.port}", "--process", "0", "--processes", "2"]
    launch.start(config, 0, 1, *several, "--config.batch_size=4")
    assert launch.wait(60) == [1, 1]
    for i in range(2):
        assert launch.said(i).count("\n") == 1
        assert "process 1 (" in launch.said(i) and "differs in config.batch_size: 2, elsewhere 4" in launch.said(i)
