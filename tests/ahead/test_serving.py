"""Steps of the engine on slices that are not there, and the bound they are measured by."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.ahead.bound import bound, chosen_experts
from kimi_jax.ahead.hlo import Instruction
from kimi_jax.ahead.program import Program

ROOT = Path(__file__).parents[2]
K2 = presets.kimi_k2_1t()


@pytest.mark.parametrize(
    ("rows", "kind", "devices", "tokens_per_s"),
    [(32, "TPU7x", 32, 7_379), (128, "TPU7x", 32, 15_553), (128, "TPU v6 lite", 64, 13_826), (32, "TPU v5", 16, 2_768)],
)
def test_the_bound_by_hand(rows, kind, devices, tokens_per_s):
    """Figures that were worked out independently, with the sizes rounded."""
    assert bound(K2, rows, 1, 1536, 2, kind, devices).tokens_per_s == pytest.approx(tokens_per_s, rel=3e-3)


def test_experts_that_tokens_choose():
    """Against drawing them."""
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(40) for e in rng.choice(64, 6, replace=False)}) for _ in range(300)]
    model = presets.tiny().replace(n_routed_experts=64, num_experts_per_tok=6)
    assert chosen_experts(model, 40) == pytest.approx(np.mean(drawn), rel=0.01)
    assert chosen_experts(model, 1) == pytest.approx(6)


def test_a_loop_that_data_end_runs_as_often_as_told():
    text = """
%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %p = (s32[], s32[]) parameter(0)
}

%condition (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element((s32[], s32[]) %q), index=0
  %n = s32[] get-tuple-element((s32[], s32[]) %q), index=1
  ROOT %less = pred[] compare(s32[] %i, s32[] %n), direction=LT
}

ENTRY %main (a: (s32[], s32[])) -> (s32[], s32[]) {
  %a = (s32[], s32[]) parameter(0)
  ROOT %loop = (s32[], s32[]) while(%a), condition=%condition, body=%body, metadata={op_name="jit(f)/walk/while"}
}
"""
    assert Program.from_text(text).runs["body"] == 1 and len(Program.from_text(text).unknown_trips) == 1
    told = Program.from_text(text, {"walk": 7})
    assert told.runs["body"] == 7 and not told.unknown_trips
    assert isinstance(told.root("body"), Instruction)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "rows", "latents"),
    [("decode", 128, "bfloat16"), ("decode", 128, "float8_e4m3fn"), ("prefill", 32, "bfloat16")],
)
def test_three_layers_of_the_released_widths(tmp_path, phase, rows, latents):
    """What a decode step reads stays near the bound; no weight is written out dequantised, no cache is copied."""
    to = tmp_path / "report.json"
    command = [sys.executable, "-m", "kimi_jax.aot", "--config", "configs/kimi_k2_1t.py", "--topology", "tpu7x:2x2x4"]
    command += ["--phase", phase, "--rows", str(rows), "--past", "60000", "--cache-dtype", latents]
    command += ["--json", str(to), "--config.model.num_hidden_layers=3"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(to.read_text())
    assert report["fits"] and report["devices"] == 32 and report["chips"] == 16
    parts = report["weights_gib"] + report["cache_gib"] + report["temporaries_gib"]
    assert math.isclose(report["peak_gib"], parts)
    if phase == "decode":
        assert report["compiled"]["read_over_bound"] < 1.15
        assert report["temporaries_gib"] < 0.1 < report["cache_gib"]
