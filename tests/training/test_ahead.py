"""`python -m kimi_jax.aot` on slices that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    model = dict(preset="tiny", hidden_size=256, num_hidden_layers=3, num_attention_heads=8)
    return ConfigDict(dict(model=model, mesh=dict(fsdp=2, expert=2), batch_size=8, seq_len=256))
"""


HUGE = ("--config.model.moe_intermediate_size=65536", "--config.model.n_routed_experts=1024")


def aot(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "small.py").write_text(CONFIG)
    command = [sys.executable, "-m", "kimi_jax.aot", "--config", str(tmp_path / "small.py"), "--fast", *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", pytest.param("v5e:2x2", marks=pytest.mark.slow)])
def test_a_small_step_compiles_and_its_memory_adds_up(tmp_path, topology):
    run = aot(tmp_path, "--topology", topology, "--json", "report.json", "--dump-hlo", "hlo")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"] and report["devices"] == 4 and report["mesh"] == {"fsdp": 2, "expert": 2}
    parts = ("parameters_gib", "optimizer_gib", "batch_gib", "temporaries_gib")
    assert report["peak_gib"] == pytest.approx(sum(report[part] for part in parts))
    assert 0 < report["parameters_gib"] < report["optimizer_gib"] < report["peak_gib"] < report["hbm_gib"]
    exchange = "ragged-all-to-all" if topology.startswith("v5p") else " all-to-all"
    assert exchange in (tmp_path / "hlo" / "train.hlo.txt").read_text()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    run = aot(tmp_path, "--topology", "v5p:2x2x1", *HUGE)
    assert run.returncode == 1
    assert "GiB: use fewer sequences per device" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("topology", "says"), [("v9:3x3", "no topology of libtpu"), ("v5p:2x2x2", "does not have the 8 devices")]
)
def test_bad_topologies(tmp_path, topology, says):
    run = aot(tmp_path, "--topology", topology, "--config.mesh.data=1")
    assert run.returncode == 1
    assert says in run.stderr.splitlines()[-1]
