"""Our reader and writer against the safetensors package, and against damaged files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kimi_jax.checkpoint.safetensors import DTYPES, INDEX, read, read_headers
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.errors import UserError


def file_of(header: object, data: bytes = b"") -> bytes:
    """A file with that header, whatever it says."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def random_tensors() -> dict[str, np.ndarray]:
    """One of every dtype, from random bytes, of several ranks; bool from random bits."""
    rng = np.random.default_rng(0)
    found = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        shape = [(), (3,), (0, 4), (2, 3, 5), (1,)][i % 5]
        raw = rng.integers(0, 2 if name == "BOOL" else 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
        found[name.lower()] = raw.view(dtype).reshape(shape)
    return found


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def test_reads_what_the_package_writes(tmp_path):
    tensors = {k: v for k, v in random_tensors().items() if v.dtype.itemsize > 1 or v.dtype.kind in "iub"}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_the_package_reads_what_we_write(tmp_path):
    """The package's numpy side has no fp8: those are compared as the bytes that it hands out."""
    tensors = random_tensors()
    write_file(tmp_path / "x.safetensors", tensors)
    found = dict(safetensors.deserialize((tmp_path / "x.safetensors").read_bytes()))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name]["dtype"] == name.upper()
        assert (tuple(found[name]["shape"]), bytes(found[name]["data"])) == (tensor.shape, tensor.tobytes())


def test_there_and_back(tmp_path):
    """In the order given, so that wide types start at odd bytes; and a transposed view."""
    tensors = {"odd": np.arange(3, dtype=np.uint8), **random_tensors(), "view": np.arange(12.0).reshape(3, 4).T}
    write_file(tmp_path / "x.safetensors", tensors)
    found = read(tmp_path / "x.safetensors")
    assert all(same(found[name], tensors[name]) for name in tensors)
    assert float(found["view"][3, 1]) == 7.0


def test_reading_is_by_map(tmp_path):
    write_file(tmp_path / "x.safetensors", {"w": np.zeros((4, 4), np.float32)})
    found = read(tmp_path / "x.safetensors")["w"]
    assert not found.flags.owndata and not found.flags.writeable


def test_a_file_that_is_in_use_can_be_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, {"w": np.ones(10_000)})
    old = read(path)["w"]
    write_file(path, {"w": np.zeros(3)})
    assert old.sum() == 10_000 and read(path)["w"].shape == (3,)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_nothing_half_written_appears(tmp_path, monkeypatch):
    """Writing fails in the middle: the old file stays, and no ``*.safetensors`` is new."""
    write_file(tmp_path / "x.safetensors", {"w": A})
    original = os.pwrite

    def failing(fd, data, offset):
        if data.nbytes == C.nbytes:
            raise OSError("disk full")
        return original(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    for name in ("x", "y"):
        with pytest.raises(UserError, match=f"cannot write .*{name}.safetensors.unfinished: disk full"):
            write_file(tmp_path / f"{name}.safetensors", {"v": B, "w": C})
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["x.safetensors"]
    assert read_headers(tmp_path).keys() == {"w"}


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, {"a.weight": np.ones((2, 3), np.float32), "b.weight": np.ones(5, ml_dtypes.bfloat16)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="x.safetensors"):
            read(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated.*b.weight"):
        read(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated"),
        (b"\xff" * 40, "header"),
        (b"<html>not found</html>", "header"),
        (file_of(b"{not json"), "damaged header"),
        (file_of(b"\xff\xfe{}"), "damaged header"),
        (file_of([1, 2]), "damaged header"),
        (file_of(b"[" * 10**6), "damaged header"),
        (file_of({"w": 3}), "damaged header"),
        (file_of({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "damaged header"),
        (file_of({"w": F32 | {"shape": ["2"]}}, bytes(8)), "damaged header|not"),
        (file_of({"w": F32 | {"shape": [-1, -2]}}, bytes(8)), "damaged header"),
        (file_of({"w": F32 | {"dtype": "F4"}}, bytes(8)), "w has the unknown dtype F4"),
        (file_of({"w": F32 | {"shape": [3]}}, bytes(8)), "w has 8 bytes"),
        (file_of({"w": F32 | {"data_offsets": [8, 0]}}, bytes(8)), "w has"),
        (file_of({"w": F32 | {"data_offsets": [-8, 0]}}, bytes(8)), "w has"),
        (file_of({"w": F32, "v": F32}, bytes(8)), "overlap"),
        (file_of({"w": F32, "v": F32 | {"data_offsets": [12, 20]}}, bytes(20)), "gap at byte 8"),
        (file_of({"w": F32}, bytes(12)), "end at byte 8"),
    ],
)
def test_damaged(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "x.safetensors")


A, B, C = (np.full(n, n, np.float32) for n in (1, 2, 3))


def index(folder, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        {"model.safetensors": {"a": A, "b": B, "c": C}},
        {"model-1-of-2.safetensors": {"a": A, "c": C}, "model-2-of-2.safetensors": {"b": B}},
        {"left.safetensors": {"b": B}, "model.safetensors": {"a": A}, "x.y.safetensors": {"c": C}},
    ],
)
def test_layouts(tmp_path, layout, with_index):
    for file, tensors in layout.items():
        write_file(tmp_path / file, tensors)
    if with_index:
        index(tmp_path, {name: file for file, tensors in layout.items() for name in tensors})
    found = read_headers(tmp_path)
    assert {name: Path(stored.file).name for name, stored in found.items()} == {
        n: f for f, ts in layout.items() for n in ts
    }
    assert all(same(content(tmp_path, name), tensor) for name, tensor in {"a": A, "b": B, "c": C}.items())


def content(folder, name) -> np.ndarray:
    """What the bytes at the place that the headers give for ``name`` stand for."""
    stored = read_headers(folder)[name]
    return np.fromfile(stored.file, stored.dtype, stored.nbytes // stored.dtype.itemsize, offset=stored.start).reshape(
        stored.shape
    )


def test_files_outside_the_index_are_not_read(tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": A})
    write_file(tmp_path / "old.safetensors", {"a": B})
    index(tmp_path, {"a": "one.safetensors"})
    assert same(content(tmp_path, "a"), A)


def test_a_single_file_replaces_an_index_that_does_not_name_it(tmp_path):
    write_file(tmp_path / "model.safetensors", {"a": A})
    index(tmp_path, {"a": "model-1-of-2.safetensors"})
    assert same(content(tmp_path, "a"), A)


def test_no_safetensors(tmp_path):
    with pytest.raises(UserError, match="no .*safetensors"):
        read_headers(tmp_path)


def test_missing_shard(tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": A})
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(UserError, match="two.safetensors is missing"):
        read_headers(tmp_path)


def test_missing_tensor(tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": A})
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(UserError, match="b is missing from .*one.safetensors"):
        read_headers(tmp_path)


def test_tensor_in_two_files(tmp_path):
    write_file(tmp_path / "one.safetensors", {"a": A})
    write_file(tmp_path / "two.safetensors", {"a": A, "b": B})
    with pytest.raises(UserError, match="a is in both .*one.safetensors and .*two.safetensors"):
        read_headers(tmp_path)


@pytest.mark.parametrize("text", ["", "[" * 10**6, "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(tmp_path, text):
    write_file(tmp_path / "one.safetensors", {"a": A})
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=INDEX):
        read_headers(tmp_path)
