"""Training checkpoints: Orbax directories, one per step, complete or invisible.

    checkpoints/<step>/state   the training state, one array per parameter
    checkpoints/<step>/meta    JSON: format_version, step, resolved config, data position

Saving is asynchronous; Orbax writes into a temporary name and renames at the end, so a directory that a kill left
behind is never taken for a checkpoint.
"""

from __future__ import annotations

import logging
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
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
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
        """The state of ``step``, in the shapes, dtypes and shardings of ``like``, and its meta."""
        meta = _checked(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"], step)
        _compare(_stored(self._directory / str(step)), like, self._directory / str(step))
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
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return _checked(reader.restore(step / "meta"), step.name)


def restore_params(path: Path) -> tuple[Params, dict[str, Any]]:
    """The parameters alone, on the first device, without the optimizer's state; and the meta."""
    step = _found(path)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.PyTreeCheckpointer() as reader:
        stored = _stored(step)["params"]
        like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), stored)
        how = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=sharding, dtype=s.dtype), like)
        request = ocp.args.PyTreeRestore(item={"params": like}, restore_args={"params": how}, partial_restore=True)
        return reader.restore(step / "state", args=request)["params"], read_meta(step)


def _stored(step: Path) -> Any:
    """Shape and dtype of every array of a checkpoint, as a nested dict."""
    with ocp.PyTreeCheckpointer() as reader:
        return reader.metadata(step / "state").item_metadata.tree


def _found(path: Path) -> Path:
    step = find(path)
    if step is None:
        raise UserError(f"{path} holds neither a Hugging Face model nor a complete checkpoint")
    return step.absolute()


def _checked(meta: dict[str, Any], step: int | str) -> dict[str, Any]:
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {step} has format version {version}; this program reads {FORMAT_VERSION}: update kimi_jax"
        )
    return meta


def _compare(found: Any, like: Any, where: Path) -> None:
    """One line on the first leaf whose shape differs from what the config asks for."""
    key = lambda path: ".".join(str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", p)))) for p in path)  # noqa: E731
    stored = {
        key(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(found) if hasattr(leaf, "shape")
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = key(path)
        if name not in stored:
            raise UserError(f"{where} has no {name}: it was written with another model or optimizer; use a new workdir")
        if tuple(stored[name]) != tuple(leaf.shape):
            raise UserError(
                f"{where}: {name} has shape {tuple(stored[name])}, the config asks for {tuple(leaf.shape)}; "
                "restore the config or use a new workdir"
            )
