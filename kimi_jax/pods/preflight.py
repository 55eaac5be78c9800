"""What has to be equal on all processes before a run may start, and a first collective over all their devices."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from kimi_jax.errors import UserError, os_errors_as
from kimi_jax.pods.roll_call import different
from kimi_jax.pods.total import Total

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def facts(config: Mapping[str, Any], workdir: Path | None) -> dict[str, str]:
    """Versions, a digest of our own sources, and every entry of the resolved config: the roll call compares them."""
    found = {"version of Python": platform.python_version()}
    found |= {f"version of {name}": _version(name) for name in PACKAGES}
    found |= {"source code of kimi_jax": _sources(), "--workdir": str(workdir)}
    return found | {key: repr(value) for key, value in entries("config", config)}


def entries(name: str, config: Any) -> Iterator[tuple[str, Any]]:
    """Every value in ``config``, at any depth, with its key as a command line has it."""
    if not isinstance(config, Mapping):
        yield name, config
        return
    for key, value in config.items():
        yield from entries(f"{name}.{key}", value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _sources() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def check_devices(devices: list[Any], name: Callable[[int], str]) -> None:
    """The same number and kind of devices on every process. ``devices`` are all of them, as each process sees them."""
    by_process: dict[int, Counter] = {}
    for device in devices:
        by_process.setdefault(device.process_index, Counter())[device.device_kind] += 1
    found = {
        process: " and ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items()))
        for process, kinds in by_process.items()
    }
    if odd := different(found):
        usual = next(value for process, value in found.items() if process not in odd)
        raise UserError(f"{name(odd[0])} has {found[odd[0]]}, elsewhere there are {usual}")


def check_collective(devices: list[Any]) -> None:
    """One sum over all processes. It hangs if a process or its network is missing: set a limit to it."""
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    found = float(np.asarray(Total(mesh)(1.0))[0])
    if found != jax.process_count():
        raise UserError(f"a sum over {jax.process_count()} processes gave {found:g}: check the network and the devices")


def check_workdir(workdir: Path, mark: str, wait_for_all: Callable[[], None], name: str) -> None:
    """``workdir`` has to be one folder that all processes see: process 0 leaves a mark there."""
    path = workdir / f".start-{mark}"
    with os_errors_as(f"cannot write to the workdir {workdir}"):
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            path.touch()
        wait_for_all()
        if not path.exists():
            raise UserError(f"{name} does not see what process 0 wrote to {workdir}: --workdir must be a shared folder")
        wait_for_all()
        if jax.process_index() == 0:
            path.unlink()
