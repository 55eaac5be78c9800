"""Training checkpoints: Orbax directories, one per step, complete or invisible.

    checkpoints/<step>/state   the training state, one array per parameter
    checkpoints/<step>/meta    JSON: format_version, step, resolved config, data position

Saving is asynchronous; Orbax writes into a temporary name and renames at the end, so a directory that a kill left
behind is never taken for a checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kimi_jax.checkpoint import paths
from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.dims import Params
from kimi_jax.errors import UserError

FOLDER, PARTS = "checkpoints", {"state", "meta"}
CHUNK_BYTES = 64 << 20  # that are written and read together, about

logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails raises, too


class Checkpoints:
    """The checkpoints of one run, the ``keep`` newest of them."""

    def __init__(self, directory: Path, keep: int = 3):
        self._directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a kill left half-written
        )
        with self._writable():
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("state", "meta"))

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to save; the arrays are copied before it returns. ``meta`` must be JSON."""
        meta = {"format_version": FORMAT_VERSION, "step": step, **meta}
        how = jax.tree.map(_layer_by_layer, state)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state, how), meta=ocp.args.JsonSave(meta))  # type: ignore
        with self._writable():
            self._manager.save(step, args=items)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state of ``step``, bit for bit, in the shapes, dtypes and shardings of ``like``, and its meta."""
        folder = self._directory / str(step)
        meta = read_meta(folder)
        _compare(_stored(folder), like, folder)
        with _readable(folder):
            items = ocp.args.Composite(state=ocp.args.StandardRestore(like))  # type: ignore
            return self._manager.restore(step, args=items)["state"], meta

    def wait(self) -> None:
        """Returns when everything that was saved is complete on disk; raises if saving failed."""
        with self._writable():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writable():
            self._manager.close()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Whatever Orbax and TensorStore raise where nothing can be written, such as on a full disk, as one line."""
        try:
            yield
        except Exception as error:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax abandons tasks, which complain at the end
            why = getattr(error, "strerror", None) or str(error).partition("\n")[0].rpartition(": ")[2]
            raise UserError(
                f"cannot write checkpoints to {self._directory}: {why}; when it can be written, the same command goes "
                "on from the newest complete one"
            ) from error


def _layer_by_layer(x: Any) -> ocp.SaveArgs:
    """Cuts large stacked arrays into layers, so that an export need not read all of them for each."""
    is_large = getattr(x, "ndim", 0) > 2 and x.nbytes > CHUNK_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,)) if is_large else ocp.SaveArgs()


def find(path: paths.AnyPath) -> paths.AnyPath | None:
    """The newest complete step folder of a workdir, of its checkpoints folder, or the step folder itself."""

    def names(folder: paths.AnyPath) -> set[str]:
        return set(paths.names(folder)) if paths.is_dir(folder) else set()

    def child(folder: paths.AnyPath, name: str) -> paths.AnyPath:
        return paths.join(folder, name) if paths.is_remote(folder) else Path(folder) / name

    there = names(path)
    if there >= PARTS:
        return path
    folder = child(path, FOLDER) if FOLDER in there else path
    steps = [child(folder, name) for name in names(folder) if name.isdigit()]
    complete = [step for step in steps if names(step) >= PARTS]
    return max(complete, key=lambda step: int(paths.name(step)), default=None)


def read_meta(path: paths.AnyPath) -> dict[str, Any]:
    """The meta of the newest checkpoint in anything that ``find`` accepts."""
    step = _found(path)
    with _readable(step):
        meta = dict(json.loads(paths.read_text(paths.join(step, "meta", "metadata"))))
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{step} has format version {version}; this program reads {FORMAT_VERSION}: update kimi_jax")
    return meta


def restore_params(path: paths.AnyPath, shardings: Any = None) -> tuple[Params, dict[str, Any]]:
    """The parameters alone, without the optimizer's state, and the meta. ``shardings``: default, the first device."""
    step = _found(path)
    meta, stored = read_meta(step), _stored(step)["params"]
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, stored)
    with _readable(step), ocp.PyTreeCheckpointer() as reader:
        like = jax.tree.map(lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s), stored, shardings)
        how = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=s.sharding, dtype=s.dtype), like)
        request = ocp.args.PyTreeRestore(item={"params": like}, restore_args={"params": how}, partial_restore=True)
        return reader.restore(paths.join(step, "state"), args=request)["params"], meta


def _stored(step: paths.AnyPath) -> Any:
    """Shape and dtype of every array of a checkpoint, as a nested dict."""
    with _readable(step), ocp.PyTreeCheckpointer() as reader:
        found = reader.metadata(paths.join(step, "state")).item_metadata
        if found is None:
            raise ValueError("the list of its arrays cannot be read")
        return found.tree


@contextmanager
def _readable(step: paths.AnyPath) -> Iterator[None]:
    """Whatever Orbax and TensorStore raise on a damaged file, as one line that names the checkpoint."""
    try:
        yield
    except Exception as error:
        first = str(error).partition("\n")[0][:200]
        raise UserError(f"{_damaged(step)} ({type(error).__name__}: {first})") from error


def _damaged(step: paths.AnyPath) -> str:
    return f"the checkpoint {step} is incomplete or damaged; move it away to use the one before it"


def _found(path: paths.AnyPath) -> paths.AnyPath:
    step = find(path)
    if step is None:
        if paths.name(path).isdigit() and paths.is_dir(path):
            lost = sorted(PARTS - set(paths.names(path)))
            raise UserError(f"{_damaged(path)} (it lacks its {' and '.join(lost)})")
        raise UserError(f"{path} holds neither a Hugging Face model nor a complete checkpoint")
    return step if paths.is_remote(step) else Path(step).absolute()


def _compare(found: Any, like: Any, where: Path) -> None:
    """One line on the first leaf that is not what the config asks for: nothing is converted, nothing left out."""
    stored, wanted = leaves(found), leaves(like)
    for name in (*wanted, *stored):
        if name not in stored or name not in wanted:
            fact = f"has no {name}" if name in wanted else f"also holds {name}"
            raise UserError(f"{where} {fact}: it was written with another model or optimizer; use a new workdir")
    for name, leaf in wanted.items():
        for what in ("shape", "dtype"):
            ours, theirs = getattr(stored[name], what), getattr(leaf, what)
            if ours != theirs:
                raise UserError(
                    f"{where}: {name} has {what} {ours}, the config asks for {theirs}; "
                    "restore the config or use a new workdir"
                )


def leaf_name(path: Any) -> str:
    """``params.norm`` for a path of ``jax.tree_util``."""
    return ".".join(str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", p)))) for p in path)


def leaves(tree: Any) -> dict[str, Any]:
    """Every array of a tree, or what stands for one, by its name."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in found if hasattr(leaf, "shape")}
