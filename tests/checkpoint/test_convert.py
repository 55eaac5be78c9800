"""Hugging Face directories of every kind and layout, converted: the same weights, read by us and by Orbax alone."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import kimi_jax
from kimi_jax.checkpoint import arrays, convert, fp8, paths, safetensors, units
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import to_hf
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.checkpoint.verify import verify
from kimi_jax.errors import UserError
from tests.checkpoint.examples import BF16, CFG, FP8, FP8_CONFIG, quantised, random_tensors, read, same, save_hf

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that matrices are cut, some with a remainder."""
    monkeypatch.setattr(units, "CHUNK_BYTES", 20_000)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return quantised(random_tensors())


@pytest.fixture(scope="module")
def source(tmp_path_factory, tensors):
    folder = save_hf(tmp_path_factory.mktemp("source") / "hf", tensors, **FP8_CONFIG, torch_dtype="bfloat16")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def assert_same_trees(found, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_equal(same(np.asarray(a), np.asarray(b)), True), found, expected)


def orbax(target, part="params"):
    """The arrays as Orbax reads them, with nothing of ours involved."""
    return ocp.PyTreeCheckpointer().restore(target / "state")[part]


def expected_params(tensors, dtype) -> dict:
    """Every parameter, by an independent way: de-quantised in f64, rounded once to f32 and once to ``dtype``."""
    full = {}
    for name, w in tensors.items():
        if not name.endswith("_scale_inv"):
            scale = tensors.get(name + "_scale_inv")
            wide = np.asarray(w, np.float64)
            if scale is not None:
                wide = wide * np.kron(scale, np.ones(fp8.BLOCK))[: w.shape[0], : w.shape[1]]
            full[name] = wide.astype(np.float32).astype(np.float32 if name.endswith("bias") else dtype)
    return full


def as_ours(full: dict[str, np.ndarray], name: str) -> np.ndarray:
    """One stacked parameter: experts.gate, [layers, experts, in, out]."""
    n = CFG.num_hidden_layers
    return np.stack(
        [
            np.stack([full[f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight"].T for e in range(4)])
            for i in range(1, n)
        ]
    )


@pytest.mark.parametrize("dtype, kept", [("bf16", BF16), ("float32", np.float32)])
def test_dequantised_exactly(tmp_path, source, tensors, dtype, kept):
    report = from_hf(source, tmp_path / "t", dtype)
    full, found = expected_params(tensors, kept), orbax(tmp_path / "t")
    assert same(found["moe_layers"]["moe"]["experts"]["gate"], as_ours(full, "gate"))
    assert same(found["moe_layers"]["moe"]["experts"]["down"], as_ours(full, "down"))
    assert same(found["embedding"], full["model.embed_tokens.weight"])
    assert same(found["lm_head"], np.ascontiguousarray(full["lm_head.weight"].T))
    heads = full["model.layers.0.self_attn.o_proj.weight"].T.reshape(3, 60, 136)
    assert same(found["dense_layers"]["attn"]["o"][0], heads)
    assert found["moe_layers"]["moe"]["router"]["bias"].dtype == np.float32
    loaded, direct = kimi_jax.load(tmp_path / "t"), kimi_jax.load(source, dtype=np.dtype(kept).name)
    assert loaded[0].cfg == direct[0].cfg
    assert_same_trees(loaded[1], direct[1])
    assert_same_trees(loaded[1], found)
    assert report["finished"] and report["bytes_written"] == sum(a.nbytes for a in jax.tree.leaves(found))


def test_fp8_bytes_and_scales_are_kept(tmp_path, source, tensors):
    from_hf(source, tmp_path / "t", "fp8", workers=3)
    weights, scales = orbax(tmp_path / "t"), orbax(tmp_path / "t", "scales")
    assert same(weights["moe_layers"]["moe"]["experts"]["up"], as_ours(tensors, "up"))
    assert weights["moe_layers"]["moe"]["experts"]["up"].dtype == FP8
    found = scales["moe_layers"]["moe"]["experts"]["up"][0, 3]
    assert same(found, np.ascontiguousarray(tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"].T))
    kv_b = tensors["model.layers.2.self_attn.kv_b_proj.weight_scale_inv"]
    assert same(scales["moe_layers"]["attn"]["kv_b"][1], np.ascontiguousarray(kv_b.T))
    assert weights["embedding"].dtype == BF16 and weights["norm"].dtype == BF16
    for dtype in (None, "bfloat16", "float32"):
        assert_same_trees(kimi_jax.load(tmp_path / "t", dtype=dtype)[1], kimi_jax.load(source, dtype=dtype)[1])


def test_the_layout_of_the_shards_does_not_matter(tmp_path, source, tensors):
    """Weights and scales in different files, padded or other names, one file or many: the same digest."""
    names = sorted(tensors)
    layouts = {
        "released": {f"model-{i + 1}-of-5.safetensors": names[i::5] for i in range(5)},
        "padded": {f"model-{i + 1:05}-of-000002.safetensors": names[i::2] for i in range(2)},
        "apart": {
            "weights.safetensors": [n for n in names if "scale" not in n],
            "scales.safetensors": [n for n in names if "scale" in n],
        },
    }
    digest = from_hf(source, tmp_path / "t", "fp8")["digest"]
    for layout, files in layouts.items():
        folder = tmp_path / layout
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        for file, held in files.items():
            write_file(folder / file, {name: tensors[name] for name in held})
        if layout != "apart":
            index = {"weight_map": {name: file for file, held in files.items() for name in held}}
            (folder / safetensors.INDEX).write_text(json.dumps(index))
        assert from_hf(folder, tmp_path / f"{layout}_t", "fp8")["digest"] == digest


def test_a_quantised_embedding(tmp_path, tensors):
    """Not in the release; its scales lie like a projection's."""
    name = "model.embed_tokens.weight"
    scales = np.random.default_rng(2).uniform(0.5, 2, [-(-n // 128) for n in tensors[name].shape]).astype(np.float32)
    every = tensors | {name: tensors[name].astype(fp8.E4M3), name + "_scale_inv": scales}
    hf = save_hf(tmp_path / "hf", every, **FP8_CONFIG, torch_dtype="bfloat16")
    from_hf(hf, tmp_path / "t", "fp8")
    assert verify(hf, tmp_path / "t").same
    assert_same_trees(kimi_jax.load(tmp_path / "t", dtype="float32")[1], kimi_jax.load(hf, dtype="float32")[1])
    to_hf(tmp_path / "t", tmp_path / "back", "fp8")
    assert all(same(w, every[key]) for key, w in read(tmp_path / "back").items())


def test_another_share_finishes_meanwhile(tmp_path, source, monkeypatch):
    """Between a share's look at the target and its own first chunk."""
    straight = from_hf(source, tmp_path / "straight", "bf16")

    def overtaken(job, progress, check):
        monkeypatch.setattr(convert, "_convert", convert_units)
        from_hf(source, tmp_path / "t", "bf16", (0, 1))
        return convert_units(job, progress, check)

    convert_units = convert._convert
    monkeypatch.setattr(convert, "_convert", overtaken)
    found = from_hf(source, tmp_path / "t", "bf16", (0, 2))
    assert found["digest"] == straight["digest"]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["hf", "meta", "state"]


def test_what_is_not_quantised(tmp_path):
    """f32 and f16 are kept exactly in float32, and rounded once to bf16."""
    full = random_tensors()
    mixed = {name: w.astype(np.float16) if "up_proj" in name else w for name, w in full.items()}
    hf = save_hf(tmp_path / "hf", mixed)
    for dtype, name in (("float32", "float32"), ("bf16", "bfloat16")):
        from_hf(hf, tmp_path / name, dtype)
        assert_same_trees(kimi_jax.load(tmp_path / name)[1], kimi_jax.load(hf, dtype=name)[1])
    with pytest.raises(UserError, match="no fp8 tensors"):
        from_hf(hf, tmp_path / "fp8", "fp8")


def test_what_a_kill_left_half_written_is_not_kept(tmp_path, source, monkeypatch):
    def killed(*_):
        for name in ("hf/tokenizer.json.7.unfinished", "hf/other.txt", "state/_METADATA.7.unfinished"):
            paths.write_text(tmp_path / "t" / name, "half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arrays, "finalise", killed)
        from_hf(source, tmp_path / "t", "bf16")
    from_hf(source, tmp_path / "t", "bf16")
    assert sorted(p.name for p in (tmp_path / "t" / "hf").iterdir()) == ["config.json", "tokenizer_config.json"]
    assert not list((tmp_path / "t").rglob("*unfinished"))


def test_a_finished_target(tmp_path, source, capsys):
    """Holds what came beside the weights and nothing of the way there; the same command does nothing."""
    first = from_hf(source, tmp_path / "t", "bf16")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["hf", "meta", "state"]
    assert sorted(p.name for p in (tmp_path / "t" / "hf").iterdir()) == ["config.json", "tokenizer_config.json"]
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "t").rglob("*"))
    assert from_hf(source, tmp_path / "t", "bf16")["digest"] == first["digest"]
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "t").rglob("*"))
    with pytest.raises(UserError, match="another source or dtype"):
        from_hf(source, tmp_path / "t", "fp8")


def test_a_finished_target_that_lost_a_file(tmp_path, source):
    """Is not complete any more: not for the same command, nor for whoever loads it."""
    from_hf(source, tmp_path / "t", "bf16")
    up = tmp_path / "t" / "state" / "params.moe_layers.moe.experts.up"
    lost = up / "c" / "1" / "2" / "0" / "0"
    content = lost.read_bytes()
    for damage in (lost.unlink, lambda: lost.write_bytes(content[:-1])):
        damage()
        with pytest.raises(UserError, match=f"{lost} and 0 other chunks are missing or damaged: remove {tmp_path}/t"):
            from_hf(source, tmp_path / "t", "bf16")
        with pytest.raises(UserError, match=f"{up}: "):
            kimi_jax.load(tmp_path / "t")
    (up / "zarr.json").unlink()
    with pytest.raises(UserError, match=f"{up}: "):
        from_hf(source, tmp_path / "t", "bf16")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_manifest(tmp_path, source, content):
    from_hf(source, tmp_path / "t", "bf16")
    (tmp_path / "t" / "meta" / "metadata").write_bytes(content)
    with pytest.raises(UserError, match=f"metadata is damaged: remove {tmp_path}/t and convert again"):
        from_hf(source, tmp_path / "t", "bf16")


def test_orbax_restores_it_sharded(tmp_path, source):
    from_hf(source, tmp_path / "t", "fp8")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "t" / "state")
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), plain)
    found = ocp.StandardCheckpointer().restore(tmp_path / "t" / "state", like)
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(found))
    assert_same_trees(found, plain)
