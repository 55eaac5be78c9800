"""Whatever is wrong with a source, or with the room for the target: one line with tensor and file, and no target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kimi_jax
from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.checkpoint.source import Source
from kimi_jax.errors import UserError
from tests.checkpoint.examples import BF16, FP8_CONFIG, quantised, random_tensors, save_hf

ROOT = Path(__file__).parents[2]
UP = "model.layers.2.mlp.experts.3.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def good() -> dict[str, np.ndarray]:
    return quantised(random_tensors())


def with_value(w: np.ndarray, value) -> np.ndarray:
    w = w.copy()
    w.flat[w.size // 2] = value
    return w


BAD = {  # what is wrong: (how to make it so, what the message says)
    "missing": (lambda t: t.pop(UP), f"lacks 1 of .*{UP}"),
    "missing scale": (lambda t: t.pop(UP + "_scale_inv"), f"model.safetensors: {UP} is fp8, but there is no"),
    "extra": (lambda t: t.update({"model.layers.9.x": np.ones(2)}), "holds 1 tensors .*model.layers.9.x"),
    "scale of bf16": (lambda t: t.update({UP: t[UP].astype(BF16)}), f"{UP} is bfloat16, but there is a"),
    "shape": (lambda t: t.update({UP: t[UP][:-1]}), rf"model.safetensors: {UP} has shape \(129, 136\)"),
    "scale's shape": (
        lambda t: t.update({UP + "_scale_inv": t[UP + "_scale_inv"][:1]}),
        rf"{UP}: scales have shape \(1, 2\), expected \(2, 2\)",
    ),
    "integers": (lambda t: t.update({NORM: t[NORM].astype(np.int32)}), f"{NORM} has dtype int32"),
    "e5m2": (lambda t: t.update({UP: t[UP].view(np.uint8)}), f"{UP} is uint8, but there is a"),
    "NaN scale": (
        lambda t: t.update({UP + "_scale_inv": with_value(t[UP + "_scale_inv"], np.nan)}),
        f"model.safetensors: {UP}.*scales hold NaN",
    ),
    "infinite scale": (
        lambda t: t.update({UP + "_scale_inv": with_value(t[UP + "_scale_inv"], np.inf)}),
        f"model.safetensors: {UP}.*scales hold NaN or infinity",
    ),
    "NaN fp8": (lambda t: t.update({UP: with_value(t[UP], np.nan)}), f"model.safetensors: {UP} holds NaN"),
    "NaN": (lambda t: t.update({NORM: with_value(t[NORM], np.nan)}), f"model.safetensors: {NORM} holds NaN"),
    "infinity": (lambda t: t.update({NORM: with_value(t[NORM], -np.inf)}), f"model.safetensors: {NORM} holds NaN"),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("what", BAD)
def test_bad_tensors(tmp_path, good, what, dtype):
    change, message = BAD[what]
    tensors = dict(good)
    change(tensors)
    source = save_hf(tmp_path / "hf", tensors, **FP8_CONFIG)
    with pytest.raises(UserError, match=message) as error:
        from_hf(source, tmp_path / "t", dtype)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        kimi_jax.load(tmp_path / "t")


def test_one_array_of_two_kinds(tmp_path, good):
    """Only fp8 has to refuse it: one stacked array has one dtype."""
    tensors = dict(good)
    tensors[UP] = tensors[UP].astype(BF16)
    del tensors[UP + "_scale_inv"]
    source = save_hf(tmp_path / "hf", tensors, **FP8_CONFIG)
    with pytest.raises(UserError, match=f"{UP} is bfloat16, .* is float8_e4m3fn: one array"):
        from_hf(source, tmp_path / "fp8", "fp8")
    assert from_hf(source, tmp_path / "bf16", "bf16")["finished"]


def test_overflow(tmp_path):
    tensors = random_tensors()
    tensors[NORM] = with_value(tensors[NORM], 3.4e38)
    source = save_hf(tmp_path / "hf", tensors)
    with pytest.raises(UserError, match=f"{NORM} .*too large for bfloat16"):
        from_hf(source, tmp_path / "bf16", "bf16")
    assert from_hf(source, tmp_path / "f32", "float32")["finished"]


def test_a_truncated_file(tmp_path, good):
    """Found by its header before anything is written; or, if it shrinks later, when its rows are read."""
    source = save_hf(tmp_path / "hf", good, **FP8_CONFIG)
    file = source / "model.safetensors"
    opened = Source.open(source)
    last = max(opened.entries, key=lambda e: opened.tensors[e.name].start)
    os.truncate(file, opened.tensors[last.name].start + opened.tensors[last.name].nbytes - 5)
    with pytest.raises(UserError, match=f"model.safetensors is truncated: {last.name} ends 5 bytes early"):
        opened.rows(last, 0, last.shape[0], opened.dtype(last))
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        from_hf(source, tmp_path / "t", "fp8")
    assert not (tmp_path / "t").exists()


def test_an_unreadable_shard(tmp_path, good):
    names = sorted(good)
    source = save_hf(tmp_path / "hf", {}, **FP8_CONFIG)
    (source / "model.safetensors").unlink()
    for i in range(2):
        write_file(source / f"part-{i}.safetensors", {name: good[name] for name in names[i::2]})
    index = {"weight_map": {name: f"part-{i}.safetensors" for i in range(2) for name in names[i::2]}}
    (source / safetensors.INDEX).write_text(json.dumps(index))
    opened = Source.open(source)
    (source / "part-1.safetensors").unlink()
    entry = next(e for e in opened.entries if opened.tensors[e.name].file.endswith("part-1.safetensors"))
    with pytest.raises(UserError, match=f"part-1.safetensors: cannot read {entry.name}: No such file"):
        opened.rows(entry, 0, 1, opened.dtype(entry))
    with pytest.raises(UserError, match="part-1.safetensors is missing"):
        from_hf(source, tmp_path / "t", "fp8")
    (source / "part-1.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot read .*part-1.safetensors: Is a directory"):
        from_hf(source, tmp_path / "t", "fp8")


def test_no_room(tmp_path, good):
    """The system refuses a write: the command ends with one line that names tensor and file, and can be repeated."""
    source, target = save_hf(tmp_path / "hf", good, **FP8_CONFIG), tmp_path / "t"
    command = [sys.executable, ROOT / "tools" / "convert_ckpt.py", "from-hf", source, target, "--dtype", "fp8"]
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *command]  # KiB: an expert's projection has 17
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert "cannot write model." in done.stderr and "File too large" in done.stderr
    with pytest.raises(UserError):
        kimi_jax.load(target)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert {str(w.dtype) for w in kimi_jax.load(target)[1].values() if hasattr(w, "dtype")} == {"float32"}


def test_unwritable(tmp_path, good):
    source = save_hf(tmp_path / "hf", good, **FP8_CONFIG)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: Not a directory"):
        from_hf(source, tmp_path / "file" / "t", "fp8")
    with pytest.raises(UserError, match="arrays cannot be kept at"):
        from_hf(source, "memory://t", "fp8")


@pytest.mark.parametrize("path", ["nowhere", "nothing://x"])
def test_no_source(tmp_path, path):
    with pytest.raises(UserError, match="cannot read|Protocol not known"):
        from_hf(path, tmp_path / "t", "bf16")
