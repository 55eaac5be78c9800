"""Checkpoints come back bit for bit, a killed save leaves nothing that could be read, and misfits are named."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax.checkpoint.manager import FORMAT_VERSION, Checkpoints, find, read_meta, restore_params
from kimi_jax.errors import UserError

ROOT = Path(__file__).parents[2]

# Orbax abandons the other reads when one fails, and those complain when they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Moments(NamedTuple):
    mu: Any
    nu: Any
    count: Any


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def state(seed: int = 0, width: int = 5, dtype=jnp.bfloat16) -> State:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (3, width), dtype=np.uint32)  # any float there is, NaN payloads too
    params = {
        "moe_layers": {"attn": {"o": jnp.asarray(bits.view(np.float32))}},
        "norm": jnp.asarray(rng.normal(size=4), dtype),
    }
    adam = Moments({"a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}, optax.MaskedNode(), jnp.int32(3))
    extras = {"key": jax.random.key_data(jax.random.key(7)), "clipped": jnp.array([True, False, True]), "none": None}
    return State(jnp.int32(4), params, (adam, optax.EmptyState(), {}, extras))


def like(state: State) -> State:
    return jax.eval_shape(lambda: state)


def bits(tree: Any) -> list[tuple]:
    return [(a.dtype, a.shape, np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)]


META = {"config": {"model": {"hidden_size": 5}, "name": "x"}, "data": {"next_step": 4}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A workdir with one checkpoint, of step 4. Read only."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(4, state(), META)
    checkpoints.close()
    return folder


@pytest.fixture
def reader(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    yield checkpoints
    checkpoints.close()


def test_bit_exact(reader):
    restored, meta = reader.restore(reader.latest(), like(state()))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    assert bits(restored) == bits(state())
    assert meta == {"format_version": FORMAT_VERSION, "step": 4, **META}


def test_params_alone(workdir):
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "4"):
        params, meta = restore_params(path)
        assert bits(params) == bits(state().params) and meta["step"] == 4
        assert jax.tree.structure(params) == jax.tree.structure(state().params)


def test_a_save_is_of_the_moment(tmp_path):
    """What happens to the arrays after ``save`` has returned does not reach the checkpoint."""
    checkpoints = Checkpoints(tmp_path)
    saved = {"w": jnp.arange(1000.0)}
    checkpoints.save(1, saved, {})
    expected = np.arange(1000.0, dtype=np.float32)
    changed = jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)(saved)
    jax.block_until_ready(changed)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, jax.eval_shape(lambda: {"w": jnp.zeros(1000)}))
    np.testing.assert_array_equal(restored["w"], expected)
    checkpoints.close()


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None and find(tmp_path) is None
    for step in (2, 10, 9999, 10_000):
        checkpoints.save(step, {"params": {"w": jnp.full(3, step)}}, {})
    checkpoints.wait()
    assert checkpoints.latest() == 10_000
    checkpoints.close()
    assert {p.name for p in tmp_path.iterdir()} == {"9999", "10000"}
    assert restore_params(tmp_path)[0]["w"].tolist() == [10_000] * 3


def with_params(change) -> State:
    changed = state()
    change(changed.params)
    return changed


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (state(width=6), r"params\.moe_layers\.attn\.o has shape \(3, 5\), the config asks for \(3, 6\)"),
        (state(dtype=jnp.float32), r"params\.norm has dtype bfloat16, the config asks for float32"),
        (with_params(lambda p: p.update(extra=jnp.zeros(2))), r"has no params\.extra"),
        (with_params(lambda p: p.pop("norm")), r"also holds params\.norm"),
    ],
    ids=["shape", "dtype", "lacking", "left_over"],
)
def test_misfit_is_named(reader, wanted, message):
    with pytest.raises(UserError, match=message) as error:
        reader.restore(4, like(wanted))
    assert "\n" not in str(error.value)


def test_newer_format_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {"format_version": FORMAT_VERSION + 1})
    checkpoints.wait()
    with pytest.raises(UserError, match=f"format version {FORMAT_VERSION + 1}"):
        checkpoints.restore(1, like(state()))
    with pytest.raises(UserError, match="update kimi_jax"):
        restore_params(tmp_path)
    checkpoints.close()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["truncated", "removed"])
@pytest.mark.parametrize("file", ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"])
def test_damage_is_named(workdir, tmp_path, file, damage):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "checkpoints" / "4"
    for path in step.glob(file):
        damage(path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for read in (lambda: restore_params(tmp_path), lambda: checkpoints.restore(4, like(state()))):
        with pytest.raises(UserError, match="checkpoints/4 is incomplete or damaged") as error:
            read()
        assert "\n" not in str(error.value)
    checkpoints.close()


@pytest.mark.parametrize("part", ["meta", "state"])
def test_a_step_that_lost_a_part_is_named(workdir, tmp_path, part):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "checkpoints" / "4"
    shutil.rmtree(step / part)
    with pytest.raises(UserError, match=f"checkpoints/4 is incomplete or damaged; move it away.*lacks its {part}"):
        read_meta(step)


def test_nothing_there(tmp_path, reader):
    with pytest.raises(UserError, match="99"):
        reader.restore(99, like(state()))
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match="complete checkpoint"):
            read_meta(path)


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write checkpoints to"):
        Checkpoints(tmp_path / "file" / "checkpoints")


FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp
from kimi_jax.checkpoint.manager import Checkpoints
from kimi_jax.errors import UserError

checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": jnp.ones(3)}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
noise = jax.random.bits(jax.random.key(0), (2**18,))
try:
    checkpoints.save(2, {"params": noise}, {})
    checkpoints.wait()
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.startswith(f"cannot write checkpoints to {tmp_path}: ") and done.stdout.count("\n") == 1
    assert "too large" in done.stdout and "the same command goes on" in done.stdout
    assert "ERROR:" not in done.stderr
    assert restore_params(tmp_path)[1]["step"] == 1


WRITER = """
import sys
import jax.numpy as jnp
from kimi_jax.checkpoint.manager import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 10_000):
    checkpoints.save(step, {"params": [jnp.full((256, 256), step + i, jnp.float32) for i in range(16)]}, {})
    print(step, flush=True)
"""


@pytest.mark.parametrize("attempt", range(2))
def test_killed_while_saving(tmp_path, attempt):
    """Whatever the moment, the newest complete step is whole, and what is left of the other goes."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout
    for _ in range(4):
        assert writer.stdout.readline()
    time.sleep(0.3 * random.random())
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    step = find(tmp_path)
    assert step
    params, meta = restore_params(tmp_path)
    assert meta["step"] == int(step.name)
    assert all((np.asarray(w) == meta["step"] + i).all() for i, w in enumerate(params))
    half_written = tmp_path / f"{meta['step'] + 5}.orbax-checkpoint-tmp"  # in case the kill hit between two saves
    shutil.copytree(step, half_written)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == meta["step"]
    checkpoints.save(meta["step"] + 1, {"params": params}, {})
    checkpoints.close()
    assert all(name.isdigit() for name in os.listdir(tmp_path))
