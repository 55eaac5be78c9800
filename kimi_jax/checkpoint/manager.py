"""Training checkpoints: Orbax directories, one per step, complete or invisible.

    checkpoints/<step>/state   the training state, one array per parameter
    checkpoints/<step>/meta    JSON: format_version, step, resolved config, data position

Saving is asynchronous; Orbax writes into a temporary name and renames at the end, so a directory that a kill left
behind is never taken for a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kimi_jax.dims import Params
from kimi_jax.errors import UserError

FORMAT_VERSION = 1
FOLDER = "checkpoints"

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run, the ``keep`` newest of them."""

    def __init__(self, directory: Path, keep: int = 3):
        self._directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a kill left half-written
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("state", "meta"))
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {directory}: {error.strerror}") from error

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to save; the arrays are copied before it returns. ``meta`` must be JSON."""
        meta = {"format_version": FORMAT_VERSION, "step": step, **meta}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))  # type: ignore
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
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def find(path: Path) -> Path | None:
    """The newest complete step folder of a workdir, of its checkpoints folder, or the step folder itself."""
    path = Path(path)
    if (path / "state").is_dir() and (path / "meta").is_dir():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = [d for d in folder.iterdir() if d.name.isdigit() and (d / "state").is_dir()] if folder.is_dir() else []
    return max(steps, key=lambda d: int(d.name), default=None)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of the newest checkpoint in anything that ``find`` accepts."""
    step = _found(path)
    with _readable(step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = dict(reader.restore(step / "meta"))
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{step} has format version {version}; this program reads {FORMAT_VERSION}: update kimi_jax")
    return meta


def restore_params(path: Path) -> tuple[Params, dict[str, Any]]:
    """The parameters alone, on the first device, without the optimizer's state; and the meta."""
    step = _found(path)
    meta, stored = read_meta(step), _stored(step)["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with _readable(step), ocp.PyTreeCheckpointer() as reader:
        like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), stored)
        how = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=sharding, dtype=s.dtype), like)
        request = ocp.args.PyTreeRestore(item={"params": like}, restore_args={"params": how}, partial_restore=True)
        return reader.restore(step / "state", args=request)["params"], meta


def _stored(step: Path) -> Any:
    """Shape and dtype of every array of a checkpoint, as a nested dict."""
    with _readable(step), ocp.PyTreeCheckpointer() as reader:
        found = reader.metadata(step / "state").item_metadata
        if found is None:
            raise ValueError("the list of its arrays cannot be read")
        return found.tree


@contextmanager
def _readable(step: Path) -> Iterator[None]:
    """Whatever Orbax and TensorStore raise on a damaged file, as one line that names the checkpoint."""
    try:
        yield
    except Exception as error:
        first = str(error).partition("\n")[0][:200]
        raise UserError(
            f"the checkpoint {step} is incomplete or damaged; move it away to use the one before it "
            f"({type(error).__name__}: {first})"
        ) from error


def _found(path: Path) -> Path:
    step = find(path)
    if step is None:
        raise UserError(f"{path} holds neither a Hugging Face model nor a complete checkpoint")
    return step.absolute()


def _compare(found: Any, like: Any, where: Path) -> None:
    """One line on the first leaf that is not what the config asks for: nothing is converted, nothing left out."""
    stored, wanted = _leaves(found), _leaves(like)
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


def _leaves(tree: Any) -> dict[str, Any]:
    def name(path: Any) -> str:
        return ".".join(str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", p)))) for p in path)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}
