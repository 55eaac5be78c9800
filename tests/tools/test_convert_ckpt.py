"""The command line: what a user types, sees and gets as exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import command_line
from tests.checkpoint.examples import FP8_CONFIG, quantised, random_tensors, save_hf
from tools import convert_ckpt

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "convert_ckpt.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("source") / "hf", quantised(random_tensors()), **FP8_CONFIG)


def test_there_and_back(tmp_path, source):
    """From any directory; relative paths; a report beside the target."""
    done = run("from-hf", source, "target/", "--dtype", "fp8", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "target is complete" in done.stdout
    report = json.loads((tmp_path / "target.report.json").read_text())
    assert report["finished"] and report["bytes_written"] == report["bytes_read"] > 0
    assert {"seconds", "bytes_per_second", "peak_rss_bytes", "digest", "source", "target"} <= report.keys()
    assert run("to-hf", tmp_path / "target", tmp_path / "back", "--shard-size", "100KB").returncode == 0
    report = json.loads((tmp_path / "back.report.json").read_text())
    assert report["bytes_written"] == report["bytes"] > 0 and report["files_written"] == report["files"] > 1
    assert run("verify", source, tmp_path / "back").returncode == 0
    shown = run("inspect", tmp_path / "target")
    assert shown.returncode == 0 and "float8_e4m3fn" in shown.stdout


def test_paths_as_people_type_them(tmp_path, monkeypatch, source):
    """The home folder, a file:// URL, the current folder: its report lies beside it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path / "target")
    assert command_line.run(convert_ckpt, "from-hf", f"file://{source}", ".").returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"target", "target.report.json"}
    assert command_line.run(convert_ckpt, "to-hf", "~/target", "file://~/back").returncode == 0
    assert command_line.run(convert_ckpt, "inspect", "~/back").returncode == 0
    assert json.loads((tmp_path / "back.report.json").read_text())["target"] == str(tmp_path / "back")


def test_a_report_that_cannot_be_written(tmp_path, source):
    """Where none was asked for, the work counts; where one was, nothing is begun."""
    (tmp_path / "t.report.json").mkdir()
    done = command_line.run(convert_ckpt, "from-hf", str(source), str(tmp_path / "t"))
    assert done.returncode == 0 and done.stderr == ""
    assert f"report not written: the report cannot be written to {tmp_path}/t.report.json: " in done.stdout
    (tmp_path / "back.report.json").mkdir()
    done = command_line.run(convert_ckpt, "to-hf", str(tmp_path / "t"), str(tmp_path / "back"))
    assert done.returncode == 0 and "report not written: " in done.stdout
    (tmp_path / "file").touch()
    for command, option in (("from-hf", "--dtype=bf16"), ("from-hf", "--dry-run"), ("to-hf", "--dtype=bf16")):
        for report, reason in (("file/r.json", "Not a directory|File exists"), ("t.report.json", "Is a directory")):
            arguments = (command, str(source), str(tmp_path / "u"), option, "--report", str(tmp_path / report))
            done = command_line.run(convert_ckpt, *arguments)
            assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
            assert re.search(f"report cannot be written to {tmp_path}/{report}: ({reason})", done.stderr)
    assert not (tmp_path / "u").exists()


def test_verify_tells_a_difference(tmp_path, source):
    tensors = quantised(random_tensors())
    name = "model.norm.weight"
    tensors[name] = -tensors[name]
    other = save_hf(tmp_path / "other", tensors, **FP8_CONFIG)
    done = run("verify", source, other)
    assert done.returncode == 1 and name in done.stdout


def test_dry_run_writes_nothing(tmp_path, source):
    done = run("from-hf", source, tmp_path / "t", "--dry-run", "--shard", "1/4")
    assert done.returncode == 0 and "4 hosts" in done.stdout and "peak memory" in done.stdout
    assert not list(tmp_path.iterdir())


def test_shares_are_counted_from_0_or_1(tmp_path, source):
    for share in ("1/3", "2/3", "3/3"):
        done = run("from-hf", source, tmp_path / "t", "--shard", share, "--report", tmp_path / "r.json")
        assert done.returncode == 0
        assert json.loads((tmp_path / "r.json").read_text())["finished"] == (share == "3/3")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "required: COMMAND"),
        (["from-hf", "a"], 2, "required: target"),
        (["from-hf", "a", "b", "--shard", "4/3"], 2, "must be I/N"),
        (["from-hf", "a", "b", "--workers", "0"], 2, "must be a positive number"),
        (["from-hf", "a", "b", "--dtype", "int8"], 2, "invalid choice"),
        (["to-hf", "a", "b", "--shard-size", "5XB"], 2, "must be a size"),
        (["to-hf", "a", "b", "--shard-size", "inf"], 2, "must be a size"),
        (["from-hf", "nowhere", "b"], 1, "cannot read nowhere/config.json"),
        (["to-hf", "nowhere", "b"], 1, "nowhere"),
        (["verify", "nowhere", "b"], 1, "nowhere"),
        (["inspect", "nowhere"], 1, "nowhere"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    done = command_line.run(convert_ckpt, *arguments)
    assert done.returncode == code and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("python tools/convert_ckpt.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["", "from-hf", "to-hf", "inspect", "verify"])
def test_help_has_examples(command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0 and f"examples:\n  python tools/convert_ckpt.py {command}" in done.stdout
