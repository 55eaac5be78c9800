"""The 1T step stays what it is: four layers of the released widths, compiled for 512 chips of v5p. Minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOUR_LAYERS = ("model.num_hidden_layers=4", "batch_size=2048", "accumulation=1")
V, D, TOKENS = 163_840, 7_168, 16_384  # of a device

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict, str]:
    return compile_step(tmp_path_factory.mktemp("step"), FOUR_LAYERS)


def compile_step(out: Path, overrides: tuple[str, ...], *more: str) -> tuple[dict, str]:
    """The report, and the program's text."""
    command = [sys.executable, "-m", "kimi_jax.aot", "--config", "configs/kimi_k2_1t.py", "--topology", "v5p:8x8x8"]
    command += [f"--config.{override}" for override in overrides] + list(more)
    command += ["--fast", "--json", str(out / "report.json"), "--dump-hlo", str(out)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads((out / "report.json").read_text()), (out / "train.hlo.txt").read_text()


def test_bytes_on_the_wire(compiled):
    """Three MoE layers at 9.0 GB, the dense one, the vocabulary, and the update."""
    report, _ = compiled
    assert report["fits"] and report["sequences_per_device"] == 4
    assert report["compiled"]["wire_gb"] < 50
    assert report["compiled"]["wire_gb_by_scope"]["update"] < 6


def test_nothing_is_reduced_that_could_be_scattered(compiled):
    """What is left: sums over "fsdp" of weights that lie split over "expert", gains, and statistics."""
    report, _ = compiled
    for row in report["compiled"]["traffic"]:
        if row["kind"] == "all-reduce" and row["axes"] != "fsdp":
            assert row["bytes"] < 0.3e9, row


def test_neither_embedding_nor_head_nor_logits_are_whole(compiled):
    _, text = compiled
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)}
    large = [dims for dims in shapes if V in dims and (D in dims or TOKENS in dims)]
    assert shapes and not large


def test_one_body_per_kind_of_layer(compiled):
    """Attention stands forward, recomputed and backward for the dense layer and for the others, however many."""
    _, text = compiled
    kernels = re.findall(r"%(splash_mha_(?:fwd|dkv))[\w.]* = .* custom-call\(", text)
    assert kernels.count("splash_mha_fwd") == 4 and kernels.count("splash_mha_dkv") == 2


def test_between_two_slices_each_gradient_travels_once(tmp_path):
    """In two microbatches of as many tokens; and no gather within a slice becomes a reduction."""
    overrides = ("model.num_hidden_layers=2", "batch_size=8192", "accumulation=2")
    report, _ = compile_step(tmp_path, overrides, "--slices", "2")
    assert report["mesh"]["data"] == 2 and report["sequences_per_device"] == 4
    crossing = [row for row in report["compiled"]["traffic"] if row["axes"] == "between slices"]
    gradients = report["parameters_gib"] * 2**30
    assert gradients <= sum(row["bytes"] for row in crossing) < 1.3 * gradients  # 56 columns of embeddings fill 128
    for row in report["compiled"]["traffic"]:
        if row["kind"] == "all-reduce" and row["axes"] != "fsdp":
            assert row["bytes"] < 0.3e9, row
