"""What ``inspect`` says of every kind of path, against what was put there."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.checkpoint import convert
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import to_hf
from kimi_jax.checkpoint.inspect import inspect
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.errors import UserError
from kimi_jax.model import parameter_count
from tests.checkpoint.examples import CFG, FP8_CONFIG, quantised, random_params, random_tensors, save_hf, save_run


def test_hugging_face(tmp_path):
    tensors = quantised(random_tensors())
    found = inspect(save_hf(tmp_path / "hf", tensors, **FP8_CONFIG))
    assert found.kind == "Hugging Face model in fp8" and found.step is None
    assert found.nbytes == sum(w.nbytes for w in tensors.values())
    assert sum(group.count for group in found.groups) == len(tensors)
    (up,) = (group for group in found.groups if group.name == "model.layers.*.mlp.experts.*.up_proj.weight")
    assert (up.count, up.shape, up.dtype, up.nbytes) == (8, (130, 136), "float8_e4m3fn", 8 * 130 * 136)
    text = str(found)
    assert f"{parameter_count(CFG):,} parameters" in text and "files: 1" in text
    assert "model.layers.*.mlp.experts.*.up_proj.weight" in text and "8 x  [130, 136]  float8_e4m3fn" in text


def test_config_alone(tmp_path):
    """The released model: its tensors hold 1,026,408,232,448 numbers, of which 60 x 384 are no parameters."""
    (tmp_path / "config.json").write_text(json.dumps(presets.kimi_k2_1t().to_hf()))
    found = inspect(tmp_path)
    assert found.kind == "Hugging Face config without weights" and not found.groups
    assert f"{1_026_408_232_448 - 60 * 384:,} parameters" in str(found)


def test_safetensors_alone(tmp_path):
    write_file(tmp_path / "x.safetensors", {"a.1.b": np.ones(3), "a.2.b": np.ones(3), "c": np.ones(2, np.int8)})
    found = inspect(tmp_path)
    assert [(g.name, g.count, g.nbytes) for g in found.groups] == [("a.*.b", 2, 48), ("c", 1, 2)]
    assert found.model is None and "float64" in str(found)


@pytest.mark.parametrize("dtype, size", [("fp8", 1), ("bf16", 2), ("float32", 4)])
def test_converted(tmp_path, dtype, size):
    from_hf(save_hf(tmp_path / "hf", quantised(random_tensors()), **FP8_CONFIG), tmp_path / "converted", dtype)
    found = inspect(tmp_path / "converted")
    assert (found.kind, found.step, found.model is not None) == ("converted checkpoint", 0, True)
    groups = {group.name: group for group in found.groups}
    up = groups["params.moe_layers.moe.experts.up"]
    assert (up.shape, up.nbytes) == ((2, 4, 136, 130), 2 * 4 * 136 * 130 * size)
    assert groups["params.moe_layers.moe.router.bias"].dtype == "float32"
    assert ("scales.moe_layers.moe.experts.up" in groups) == (dtype == "fp8")
    facts = dict(found.facts)
    assert facts.keys() == {"dtype", "digest", "source"} and facts["digest"] in str(found)


def test_training(tmp_path):
    """The newest step of a workdir, the optimizer's arrays and scalars included; or a step by itself."""
    params = random_params()
    save_run(tmp_path / "run", params, step=5)
    save_run(tmp_path / "run", params, step=12)
    for path, step in ((tmp_path / "run", 12), (tmp_path / "run" / "checkpoints" / "5", 5)):
        found = inspect(path)
        assert (found.kind, found.step) == ("training checkpoint", step)
        groups = {group.name: group for group in found.groups}
        assert groups["momentum.norm"].shape == (3,) and groups["step"].shape == ()
        assert groups["params.embedding"].nbytes == 40 * 136 * 4
        assert f"step {step}" in str(found)


def test_unfinished_conversion(tmp_path, monkeypatch):
    source, calls = save_hf(tmp_path / "hf", random_tensors()), []
    write = convert._write

    def failing(*args):
        calls.append(args)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(convert, "_write", failing)
    with pytest.raises(UserError):
        from_hf(source, tmp_path / "converted", "bf16", workers=1)
    found = inspect(tmp_path / "converted")
    assert found.kind == "unfinished conversion, which nothing loads"
    assert found.progress is not None and found.progress.startswith("10 of ")
    (embedding,) = (group for group in found.groups if group.name == "params.embedding")
    assert (embedding.shape, embedding.dtype, embedding.nbytes) == ((40, 136), "bfloat16", 40 * 136 * 2)
    monkeypatch.undo()
    from_hf(source, tmp_path / "converted", "bf16")
    assert inspect(tmp_path / "converted").kind == "converted checkpoint"


def test_unfinished_export(tmp_path, monkeypatch):
    source, calls = save_run(tmp_path / "run", random_params()), []
    fsync = os.fsync

    def failing(fd):
        calls.append(fd)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(UserError):
            to_hf(source, tmp_path / "hf", shard_size=200_000)
    found = inspect(tmp_path / "hf")
    n_files = to_hf(source, tmp_path / "hf", shard_size=200_000)["files"]
    assert found.kind == "unfinished export" and found.progress == (
        f"3 of {n_files} files are written; the same command goes on"
    )
    assert inspect(tmp_path / "hf").kind == "Hugging Face model"


def test_json(tmp_path):
    found = json.loads(inspect(save_hf(tmp_path / "hf", random_tensors())).as_json())
    assert found["kind"] == "Hugging Face model" and found["bytes"] == 4 * sum(
        w.size for w in random_tensors().values()
    )
    assert found["parameters"] == parameter_count(CFG) and found["model"]["hidden_size"] == 136
    assert {"name", "count", "shape", "dtype", "nbytes"} == found["groups"][0].keys()


@pytest.mark.parametrize("path", ["", "nowhere", "file", "model.safetensors"])
def test_nothing(tmp_path, path):
    if path not in ("", "nowhere"):
        (tmp_path / path).write_text("x")
    with pytest.raises(UserError, match="there is no|holds neither"):
        inspect(tmp_path / path)
