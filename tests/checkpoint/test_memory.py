"""Peak memory of a conversion: bounded, whatever the size of the model and of its largest array."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.checkpoint import fp8, paths
from kimi_jax.checkpoint.hf_names import plan
from tests.checkpoint.examples import FP8_CONFIG

ROOT = Path(__file__).parents[2]
NAMES = {
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def hollow(folder: Path, experts: int) -> int:
    """A source of zeros that takes no room on the disk; its bytes."""
    cfg = presets.kimi_k2_1t().replace(
        vocab_size=2048, num_hidden_layers=2, n_routed_experts=experts, intermediate_size=2048, num_attention_heads=4
    )
    header, end = {}, 0
    for entry in plan(cfg):
        parts = [(entry.name, entry.shape, np.dtype(np.float32 if entry.path[-1] == "bias" else ml_dtypes.bfloat16))]
        if "_proj" in entry.name:
            rows, columns = entry.shape
            scale = (f"{entry.name}_scale_inv", fp8.grid((rows, columns)), np.dtype(np.float32))
            parts = [(entry.name, entry.shape, fp8.E4M3), scale]
        for name, shape, dtype in parts:
            start, end = end, end + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    (folder / "config.json").write_text(json.dumps(cfg.to_hf() | FP8_CONFIG))
    return end


def python(*command) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """8.6 GB in three stacked arrays of 2.8 GB each, against a model of a sixteenth."""
    base = int(python("-c", "import kimi_jax.checkpoint.convert as c; print(c.peak_rss())"))
    peaks = {}
    for experts in (12, 192):
        source, target = tmp_path / f"hf{experts}", tmp_path / "t"
        n = hollow(source, experts)
        python(ROOT / "tools" / "convert_ckpt.py", "from-hf", source, target, "--dtype", "fp8", "--workers", "4")
        peaks[experts] = json.loads(Path(f"{target}.report.json").read_text())["peak_rss_bytes"]
        assert sum(paths.sizes(target, deep=True).values()) >= n
        shutil.rmtree(target)
    assert n > 8e9
    assert peaks[192] - base <= 1.5 * 2**30
    assert peaks[192] - peaks[12] <= 64 * 2**20
