"""Shards written piece by piece, against the safetensors package; nothing half-written appears."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from kimi_jax.checkpoint.safetensors import INDEX
from kimi_jax.checkpoint.safetensors_writer import TensorSpec, is_complete, plan_shards, write_index, writing
from kimi_jax.errors import UserError
from tests.checkpoint.examples import read, same

DTYPES = [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def random_tensors(n: int = 12) -> dict[str, np.ndarray]:
    """Odd sizes of every width, so that only their order keeps them aligned; a scalar and an empty one."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (1, 1, 3), (13, 3), (), (0, 4)]
    found = {}
    for i in range(n):
        dtype, shape = np.dtype(DTYPES[i % 3]), shapes[i % len(shapes)]
        raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        found[f"layers.{i}.w"] = raw.view(dtype).reshape(shape)
    return found


def specs(tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec(name, w.shape, w.dtype) for name, w in tensors.items()]


def write_all(folder, shards, tensors) -> None:
    for shard in shards:
        with writing(folder, shard) as file:
            for spec in shard.tensors:
                file.write(spec.name, 0, tensors[spec.name])
    write_index(folder, shards)


@pytest.mark.parametrize("shard_size", [1, 400, 700, 10**9])
def test_the_package_reads_it(tmp_path, shard_size):
    tensors = random_tensors()
    shards = plan_shards(specs(tensors), shard_size)
    write_all(tmp_path, shards, tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    seen = {}
    for file in files:
        for name, entry in safetensors.deserialize(file.read_bytes()):
            seen[name] = (tuple(entry["shape"]), bytes(entry["data"]))
        with safetensors.safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert seen == {name: (w.shape, w.tobytes()) for name, w in tensors.items()}
    assert all(same(w, tensors[name]) for name, w in read(tmp_path).items())


@pytest.mark.parametrize("shard_size", [1, 400, 700, 10**9])
def test_sizes(tmp_path, shard_size):
    """In the order given; no file is larger unless it holds one tensor; neighbours do not fit in one.

    Up to 80 bytes per tensor may stay free: the header's size is bounded, not known, while a file is filled.
    """
    tensors = random_tensors(40)
    shards = plan_shards(specs(tensors), shard_size)
    write_all(tmp_path, shards, tensors)
    sizes = [(tmp_path / shard.file).stat().st_size for shard in shards]
    assert all(size <= shard_size or len(shard.tensors) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert all(
        a + b + 80 * len(shard.tensors) > shard_size for a, b, shard in zip(sizes, sizes[1:], shards, strict=False)
    )
    numbers = [{int(spec.name.split(".")[1]) for spec in shard.tensors} for shard in shards]
    assert [sorted(group) for group in numbers] == [list(range(min(group), max(group) + 1)) for group in numbers]
    assert [n for group in numbers for n in sorted(group)] == list(range(40))


def test_tensors_are_aligned():
    """torch maps a tensor only at a multiple of its element's size."""
    for shard in plan_shards(specs(random_tensors()), 600):
        length = int.from_bytes(shard.header[:8], "little")
        header = json.loads(shard.header[8 : 8 + length])
        for spec in shard.tensors:
            assert (8 + length + header[spec.name]["data_offsets"][0]) % spec.dtype.itemsize == 0


def test_index(tmp_path):
    tensors = random_tensors()
    shards = plan_shards(specs(tensors), 700)
    write_all(tmp_path, shards, tensors)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in tensors.values())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, "numpy") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert index["weight_map"].keys() == tensors.keys()


def test_pieces_by_many_threads(tmp_path):
    w = np.random.default_rng(1).standard_normal((97, 31)).astype(np.float32)
    (shard,) = plan_shards([TensorSpec("a", (3,), np.dtype(np.uint8)), TensorSpec("w", w.shape, w.dtype)], 10**9)
    with writing(tmp_path, shard) as file, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: file.write("w", i * 31, w[i : i + 5]), range(0, 97, 5)))
        file.write("a", 0, np.arange(3, dtype=np.uint8))
    found = safetensors.numpy.load_file(tmp_path / shard.file)
    np.testing.assert_array_equal(found["w"], w)
    np.testing.assert_array_equal(found["a"], [0, 1, 2])


def test_a_view_that_is_not_contiguous(tmp_path):
    w = np.arange(35, dtype=np.float32).reshape(5, 7).T
    (shard,) = plan_shards([TensorSpec("w", w.shape, w.dtype)], 10**9)
    with writing(tmp_path, shard) as file:
        file.write("w", 0, w[:3])
        file.write("w", 15, w[3:])
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / shard.file)["w"], w)


def test_nothing_half_written_appears(tmp_path):
    """Not after an error, not after an interrupt, not with bytes missing; and a second attempt starts over."""
    tensors = random_tensors(3)
    (shard,) = plan_shards(specs(tensors), 10**9)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), writing(tmp_path, shard) as file:
            file.write("layers.0.w", 0, tensors["layers.0.w"])
            raise error
    with pytest.raises(AssertionError, match="not written"), writing(tmp_path, shard):
        pass
    assert not list(tmp_path.glob("*.safetensors")) and not is_complete(tmp_path, shard)
    write_all(tmp_path, [shard], tensors)
    assert is_complete(tmp_path, shard) and not list(tmp_path.glob("*.unfinished"))


def test_complete_means_this_header_and_this_size(tmp_path):
    tensors = random_tensors(6)
    (shard,) = plan_shards(specs(tensors), 10**9)
    write_all(tmp_path, [shard], tensors)
    path = tmp_path / shard.file
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:40], b"", whole.replace(b"layers.3", b"layers.8")):
        path.write_bytes(damaged)
        assert not is_complete(tmp_path, shard)
    path.write_bytes(whole)
    assert is_complete(tmp_path, shard)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = random_tensors(3)
    (shard,) = plan_shards(specs(tensors), 10**9)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=f"cannot write .*{shard.file}.unfinished: No space left on device"):
        write_all(tmp_path, [shard], tensors)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / INDEX).exists()
