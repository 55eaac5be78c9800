"""Arrays written chunk by chunk, in several orders of axes, against numpy and as Orbax reads them."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kimi_jax.checkpoint.arrays import Arrays, ArraySpec, chunk_file, finalise
from kimi_jax.errors import UserError

SPECS = {
    "params.a.w": ArraySpec((3, 4, 6), np.dtype(ml_dtypes.float8_e4m3fn), (1, 4, 2), (0, 2, 1)),
    "params.padded": ArraySpec((7, 5), np.dtype(ml_dtypes.bfloat16), (3, 5), (0, 1)),
    "params.padded_out": ArraySpec((5, 7), np.dtype(np.float32), (5, 3), (1, 0)),
    "params.heads": ArraySpec((2, 3, 4, 5), np.dtype(np.float32), (1, 3, 4, 5), (0, 2, 3, 1)),
    "params.zeros": ArraySpec((4,), np.dtype(np.float32), (4,), (0,)),
    "scales.a.w": ArraySpec((3, 2), np.dtype(np.float32), (1, 2), (0, 1)),
}


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {name: rng.standard_normal(s.shape, np.float32).astype(s.dtype) for name, s in SPECS.items()}
    return found | {"params.zeros": np.zeros(4, np.float32)}


def part(value: np.ndarray, spec: ArraySpec, cell: tuple[int, ...]) -> np.ndarray:
    """What a chunk should hold, in the order of its file."""
    index = tuple(slice(i * c, (i + 1) * c) for i, c in zip(cell, spec.chunk, strict=True))
    return np.ascontiguousarray(value[index].transpose(spec.order))


@pytest.fixture(scope="module")
def state(tmp_path_factory, values):
    """Written by two, who do not know of each other."""
    folder = tmp_path_factory.mktemp("arrays") / "state"
    writers = [Arrays.create(folder, SPECS) for _ in range(2)]
    for name, spec in SPECS.items():
        for i, cell in enumerate(np.ndindex(spec.grid)):
            writers[i % 2].write_chunk(name, cell, part(values[name], spec, cell))
    finalise(folder, SPECS)
    return folder


def bits(a: np.ndarray) -> tuple:
    a = np.asarray(a)
    return a.dtype, a.shape, a.tobytes()


def test_orbax_reads_them(state, values):
    for checkpointer in (ocp.PyTreeCheckpointer, ocp.StandardCheckpointer):
        found = checkpointer().restore(state)
        assert bits(found["params"]["a"]["w"]) == bits(values["params.a.w"])
        for name in ("padded", "padded_out", "heads", "zeros"):
            assert bits(found["params"][name]) == bits(values["params." + name])
        assert bits(found["scales"]["a"]["w"]) == bits(values["scales.a.w"])


def test_slices(state, values):
    arrays = Arrays.open(state)
    assert set(arrays.names()) == set(SPECS)
    assert {name: arrays.spec(name) for name in SPECS} == SPECS
    for name, value in values.items():
        assert bits(arrays.read(name)) == bits(value)
    w = values["params.a.w"]
    assert bits(arrays.read("params.a.w", (1, slice(1, 3)))) == bits(w[1, 1:3])
    assert bits(arrays.read_stored("params.a.w", (1, slice(1, 3)))) == bits(w[1, 1:3].T)
    assert bits(arrays.read_stored("params.a.w", (slice(0, 2),))) == bits(w[:2].swapaxes(1, 2))
    assert bits(arrays.read_stored("params.heads", (1,))) == bits(values["params.heads"][1].transpose(1, 2, 0))


def test_a_chunk_is_its_bytes(state, values):
    """Nothing but the numbers, in the order of the file, then zeros."""
    arrays = Arrays.open(state)
    for name, spec in SPECS.items():
        for cell in np.ndindex(spec.grid):
            expected = part(values[name], spec, cell)
            raw = (state / chunk_file(name, cell)).read_bytes()
            assert raw == expected.tobytes() + bytes(spec.chunk_bytes - expected.nbytes)
            assert bits(arrays.read_chunk(name, cell)) == bits(expected)


def test_what_orbax_writes_is_read(tmp_path, values):
    tree = {"params": {"w": values["params.heads"]}, "step": np.int32(3)}
    with ocp.StandardCheckpointer() as new:
        new.save(tmp_path / "one", tree)
    with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=False) as old:
        old.save(tmp_path / "old", tree)
    for folder in ("one", "old"):
        arrays = Arrays.open(tmp_path / folder)
        assert bits(arrays.read("params.w", (1, slice(0, 2)))) == bits(values["params.heads"][1, :2])
        assert bits(arrays.read_stored("params.w", (0,))) == bits(values["params.heads"][0])
        assert int(arrays.read("step")) == 3


def test_a_missing_chunk_is_damage(state, tmp_path):
    """Zeros are stored: what is not there was lost."""
    copy = shutil.copytree(state, tmp_path / "state")
    lost = copy / chunk_file("params.a.w", (1, 0, 2))
    lost.unlink()
    arrays = Arrays.open(copy)
    with pytest.raises(UserError, match=f"{copy}/params.a.w: .*{lost}.* is missing") as error:
        arrays.read("params.a.w")
    assert "\n" not in str(error.value)


def test_zeros_that_orbax_left_out_are_read(tmp_path):
    """As its older checkpoints say in their metadata that they do."""
    with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True) as writer:
        writer.save(tmp_path / "state", {"w": np.zeros((2, 3), np.float32)})
    assert (Arrays.open(tmp_path / "state").read("w") == 0).all()
    listed = json.loads((tmp_path / "state" / "_METADATA").read_text())
    del listed["store_array_data_equal_to_fill_value"]
    (tmp_path / "state" / "_METADATA").write_text(json.dumps(listed))
    shutil.rmtree(tmp_path / "state" / "w" / "c")
    assert (Arrays.open(tmp_path / "state").read("w") == 0).all()


def test_damage_is_named(tmp_path, values):
    spec = {"w": SPECS["params.a.w"]}
    writer = Arrays.create(tmp_path, spec)
    with pytest.raises(UserError, match="no complete checkpoint"):
        Arrays.open(tmp_path)
    writer.write_chunk("w", (0, 0, 0), part(values["params.a.w"], spec["w"], (0, 0, 0)))
    finalise(tmp_path, spec)
    arrays = Arrays.open(tmp_path)
    file = tmp_path / chunk_file("w", (0, 0, 0))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{tmp_path}/w: ") as error:
        arrays.read("w", (0,))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no array v"):
        arrays.read("v")
    with pytest.raises(UserError, match=f"{tmp_path}/w: "):
        Arrays.create(tmp_path, {"w": SPECS["params.padded"]})
