"""Local copies come back bit for bit or not at all: damaged pieces, other runs and other starts are not taken."""

from __future__ import annotations

import errno
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kimi_jax.checkpoint.emergency import LocalCopies, Save
from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.errors import UserError

RUN, START = "a1", "b2"


def pieces(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, (3, 5), dtype=np.uint16)  # any float there is, NaN payloads too
    return {
        "params.norm bfloat16 [0:3/6,0:5/5]": bits.view(ml_dtypes.bfloat16),
        "params.o float32 [3:6/6]": rng.integers(0, 2**32, 3, dtype=np.uint32).view(np.float32),
        "clipped bool [0:3/3]": np.array([True, False, True]),
        "step int32 []": np.array(7 + seed, np.int32),
    }


def bits(found: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in found.items()}


def copies(folder, run: str = RUN, start: str = START, process: int = 0) -> LocalCopies:
    return LocalCopies(folder, run, start, process)


def file(folder):
    (path,) = folder.glob("*/*.safetensors")
    return path


def test_pieces_come_back_bit_for_bit_at_another_start_and_process(tmp_path):
    copies(tmp_path).write(20, pieces())
    found = copies(tmp_path, start="c3", process=5).read(Save(20, START))
    assert bits(found) == bits(pieces())


def test_the_pieces_of_several_processes_come_together(tmp_path):
    first, *rest = pieces().items()
    copies(tmp_path).write(20, dict([first]))
    copies(tmp_path, process=1).write(20, dict(rest))
    assert bits(copies(tmp_path).read(Save(20, START))) == bits(pieces())


def test_a_truncated_file_holds_nothing(tmp_path):
    copies(tmp_path).write(20, pieces())
    os.truncate(file(tmp_path), file(tmp_path).stat().st_size - 1)
    assert copies(tmp_path).read(Save(20, START)) == {}


def test_a_flipped_bit_costs_its_piece_at_most(tmp_path):
    copies(tmp_path).write(20, pieces())
    whole = file(tmp_path).read_bytes()
    for at in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file(tmp_path).write_bytes(damaged)
        found = bits(copies(tmp_path).read(Save(20, START)))
        unhurt = bits(pieces())
        assert all(unhurt.get(name) == value for name, value in found.items()), f"byte {at} of {len(whole)}"
    damaged = whole.replace(pieces()["params.o float32 [3:6/6]"].tobytes(), bytes(12))
    file(tmp_path).write_bytes(damaged)
    assert copies(tmp_path).read(Save(20, START)).keys() == pieces().keys() - {"params.o float32 [3:6/6]"}


def test_another_run_or_start_or_format_has_none_of_them(tmp_path):
    copies(tmp_path).write(20, pieces())
    assert copies(tmp_path, run="d4").saves() == set()
    assert copies(tmp_path).read(Save(20, "c3")) == {}
    stolen = tmp_path / "d4" / file(tmp_path).name
    stolen.write_bytes(file(tmp_path).read_bytes())
    assert copies(tmp_path, run="d4").read(Save(20, START)) == {}
    ours = tmp_path / RUN / stolen.name
    newer = ours.read_bytes().replace(f'"format_version": {FORMAT_VERSION}'.encode(), b'"format_version": 9')
    assert newer != ours.read_bytes()
    ours.write_bytes(newer)
    assert copies(tmp_path).read(Save(20, START)) == {}


def test_two_starts_that_wrote_the_same_step_stay_apart(tmp_path):
    copies(tmp_path, start="b2").write(20, pieces(0))
    copies(tmp_path, start="c3").write(20, pieces(1))
    assert copies(tmp_path).saves() == {Save(20, "b2"), Save(20, "c3")}
    for seed, start in enumerate(("b2", "c3")):
        assert bits(copies(tmp_path).read(Save(20, start))) == bits(pieces(seed))


def test_what_is_kept_and_what_is_left_to_others(tmp_path):
    copies(tmp_path, start="a0").write(10, pieces())  # an earlier start: ours to remove
    ours, neighbour, stranger = copies(tmp_path), copies(tmp_path, process=1), copies(tmp_path, run="d4")
    stranger.write(10, pieces())
    for step in (20, 30):
        ours.write(step, pieces())
        neighbour.write(step, pieces())
    (tmp_path / RUN / f"20-{START}-0.safetensors.unfinished").touch()
    assert ours.newest() == Save(30, START)
    ours.keep_only([Save(30, START)])
    left = {path.name for path in (tmp_path / RUN).iterdir()}
    assert left == {f"{step}-{START}-{p}.safetensors" for step, p in ((30, 0), (30, 1), (20, 1))}
    ours.remove()
    neighbour.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["d4"] and stranger.saves() == {Save(10, START)}


def test_a_full_disk_leaves_the_copy_before(tmp_path, monkeypatch):
    ours = copies(tmp_path)
    ours.write(20, pieces())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="40-b2-0.*No space left"):
        ours.write(40, pieces())
    assert ours.saves() == {Save(20, START)} and len(list((tmp_path / RUN).iterdir())) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        copies(tmp_path / "file")


def test_a_scalar_of_jax(tmp_path):
    copies(tmp_path).write(1, {"step int32 []": np.asarray(jnp.int32(3))})
    assert copies(tmp_path).read(Save(1, START))["step int32 []"].item() == 3
