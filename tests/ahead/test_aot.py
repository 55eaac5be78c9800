"""`python -m kimi_jax.aot` on slices that are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kimi_jax import aot as aot_command
from tests import command_line

ROOT = Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    model = dict(preset="tiny", num_hidden_layers=1, first_k_dense_replace=0, remat="full", num_attention_heads=4)
    return ConfigDict(dict(model=model, mesh=dict(fsdp=2, expert=2), batch_size=8, seq_len=128))
"""

DENSE = ("--config.model.first_k_dense_replace=1", "--config.mesh.expert=1", "--config.optimizer.name=adamw")
HUGE = (*DENSE, "--config.mesh.fsdp=4", "--config.model.intermediate_size=67108864")


def aot(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "small.py").write_text(CONFIG)
    command = [sys.executable, "-m", "kimi_jax.aot", "--config", str(tmp_path / "small.py"), "--fast", *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", pytest.param("v5e:2x2", marks=pytest.mark.slow)])
def test_a_small_step_compiles_and_its_report_adds_up(tmp_path, topology):
    run = aot(tmp_path, "--topology", topology, "--json", "report.json", "--dump-hlo", "hlo")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"] and report["devices"] == 4 and report["mesh"] == {"fsdp": 2, "expert": 2}
    parts = ("parameters_gib", "optimizer_gib", "batch_gib", "activations_gib", "temporaries_gib")
    assert report["peak_gib"] == pytest.approx(sum(report[part] for part in parts))
    assert 0 < report["parameters_gib"] <= report["optimizer_gib"] < report["peak_gib"] < report["hbm_gib"]

    text = (tmp_path / "hlo" / "train.hlo.txt").read_text()
    exchange = "ragged-all-to-all" if topology.startswith("v5p") else "all-to-all"
    compiled = report["compiled"]
    kinds = {(row["kind"], row["axes"]) for row in compiled["traffic"]}
    assert (exchange, "expert") in kinds and f" {exchange}(" in text
    assert sum(row["bytes"] for row in compiled["traffic"]) == pytest.approx(1e9 * compiled["wire_gb"])
    assert sum(compiled["wire_gb_by_scope"].values()) == pytest.approx(compiled["wire_gb"])
    assert compiled["flops_over_model"] > 1 and compiled["optimizer_flops_over_minimum"] >= 1
    assert compiled["seconds_overlapped"] <= compiled["seconds_serial"]
    assert compiled["mfu_serial"] <= compiled["mfu_overlapped"] < 1
    assert compiled["routing"]["worst_over_balanced"] == 1 and len(compiled["routing"]["loops"]) >= 1
    for line in ("memory: fits", "optimizer", "ragged-all-to-all", "nothing overlapped", "links reach"):
        assert line in run.stdout or topology.startswith("v5e")


def test_what_does_not_fit_is_refused_in_one_line_that_says_what_would(tmp_path):
    run = aot(tmp_path, "--topology", "v5p:2x2x1", *HUGE, "--json", "report.json")
    assert run.returncode == 1 and "memory: does NOT fit" in run.stdout
    last = run.stderr.splitlines()[-1]
    assert re.search(r"GiB; what would fit, by estimate: \d+ times as many devices$", last)
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["fits"] and report["compiled"] is None and report["peak_gib"] > report["hbm_gib"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--topology", "v9:3x3"), 1, "no topology of libtpu"),
        (("--topology", "v5p:2x2x2", "--config.mesh.data=1"), 1, "does not have the 8 devices"),
        (("--topology", "v4:2x2x1"), 1, "is of TPU v4"),
        (("--topology", "v5p:0x2x2"), 1, "is no topology"),
        (("--topology", "v5p=0x2x2"), 1, "is no topology"),
        (("--topology", "v5p_0x2x2"), 1, "is no topology"),
        (("--topology", "v5p:2x2x0_twisted"), 1, "is no topology"),
        (("--topology", "v5p:2x2x1", "--sweep", "0"), 2, "--sweep takes a number from 1 on"),
        (("--topology", "v5p:2x2x1", "--config.steps", "3"), 2, "written --config.KEY=VALUE"),
        (("--topology", "v5p:2x2x1", "--json", f"{__file__}/report.json"), 1, "cannot write to"),
        (("--topology", "v5p:2x2x1", "--json", str(ROOT)), 1, "is a folder: name a file"),
        (("--topology", "v5p:2x2x1", "--dump-hlo", __file__), 1, "cannot write to"),
    ],
)
def test_bad_requests(tmp_path, arguments, code, says):
    (tmp_path / "small.py").write_text(CONFIG)
    run = command_line.run(aot_command, "--config", str(tmp_path / "small.py"), *arguments)
    assert run.returncode == code
    assert says in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("phase", "weights", "most_rows", "temporaries_gib", "says"),
    [
        ("decode", "bf16", 64, 1, "what would fit: 64 rows, or more devices, or --weights fp8"),
        ("decode", "fp8", 64, 1, "what would fit: 64 rows, or more devices"),
        ("decode", "int8", 0, 1, "what would fit: more devices"),
        ("prefill", "fp8", 64, 10, "what would fit: 64 rows, or a smaller --width, or more devices"),
        ("prefill", "fp8", 0, 90, "what would fit: a smaller --width"),  # activations are whole on every device
    ],
)
def test_what_would_fit_of_a_served_step(tmp_path, monkeypatch, phase, weights, most_rows, temporaries_gib, says):
    refused = SimpleNamespace(peak_gib=100, hbm_gib=95, most_rows=most_rows, temporaries_gib=temporaries_gib)
    monkeypatch.setattr("kimi_jax.ahead.serving.compile_serving", lambda *_: (refused, None))
    monkeypatch.setattr("kimi_jax.ahead.serving_table.serving_table", str)
    (tmp_path / "small.py").write_text(CONFIG)
    request = ("--config", str(tmp_path / "small.py"), "--topology", "v5p:2x2x1", "--phase", phase)
    run = command_line.run(aot_command, *request, "--weights", weights)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].endswith(says)


@pytest.mark.slow
def test_a_sweep_ranks_what_it_compiles(tmp_path):
    whole = (*DENSE, "--config.model.num_attention_heads=1")  # nothing to split over tensor
    run = aot(tmp_path, "--topology", "v5p:2x2x1", *whole, "--sweep", "2", "--json", "all.json")
    assert run.returncode == 0, run.stderr
    reports = json.loads((tmp_path / "all.json").read_text())
    times = [report["compiled"]["seconds_per_token"] for report in reports]
    assert times == sorted(times) and "rank" in run.stdout
    assert len(reports) + run.stdout.count("not compiled: ") == 2  # some libtpu abort on some small arrays


@pytest.mark.slow
def test_several_slices(tmp_path):
    run = aot(tmp_path, "--topology", "v6e:2x2", "--slices", "2", "--json", "report.json")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 8 and report["mesh"] == {"data": 2, "fsdp": 2, "expert": 2}
    assert report["compiled"]["time"]["network"] > 0
