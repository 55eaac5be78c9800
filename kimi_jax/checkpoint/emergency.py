"""Copies of a run's state on the hosts that train it: files of pieces (``pieces.py``), in a folder of each host.

    FOLDER/<run>/<step>-<start>-<process>.safetensors

``run`` and ``start`` are random: no run takes the copies of another for its own, and no start mixes its pieces with
those that an earlier one wrote for the same step. ``process`` keeps the files of several processes on one machine
apart; at the next start any process may have them. What lies under other runs is left alone.

Beside its pieces a file has the tensor "about", JSON with what the name says, the format version and a digest of every
piece. A piece that was damaged counts as missing.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.checkpoint import digest, safetensors
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.errors import UserError, os_errors_as

NAME = re.compile(r"(\d+)-([0-9a-f]+)-(\d+)\.safetensors(\.unfinished)?")
ABOUT = "about"
THREADS = 8  # that read and compare digests


class Save(NamedTuple):
    """What all processes wrote at one step. The greatest is the newest."""

    step: int
    start: str


class LocalCopies:
    """The copies of one run in ``folder``. This process owns its files of this start, and those of earlier starts."""

    def __init__(self, folder: Path, run: str, start: str, process: int):
        self._folder, self._run, self._start, self._process = folder / run, run, start, process
        with os_errors_as(f"cannot write {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()

    def write(self, step: int, pieces: Mapping[str, np.ndarray]) -> None:
        """The file appears when it is complete."""
        name = f"{step}-{self._start}-{self._process}.safetensors"
        write(self._folder / name, pieces, self._about(Save(step, self._start)))

    def saves(self) -> set[Save]:
        """Of which there are files here."""
        return {save for _, save, _, finished in self._files() if finished}

    def read(self, save: Save) -> dict[str, np.ndarray]:
        """All pieces of ``save`` in this folder that are whole, as views of the mapped files."""
        found: dict[str, np.ndarray] = {}
        for path, save_, _, finished in self._files():
            if finished and save_ == save:
                found |= read(path, self._about(save))
        return found

    def newest(self) -> Save | None:
        """The newest that this process owns."""
        return max((save for _, save, owned, finished in self._files() if owned and finished), default=None)

    def keep_only(self, saves: Collection[Save]) -> None:
        """Removes everything else that this process owns."""
        for path, save, owned, finished in self._files():
            if owned and not (finished and save in saves):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes all that this process owns, and the folder of the run if that leaves it empty."""
        self.keep_only([])
        with suppress(OSError):
            self._folder.rmdir()

    def _about(self, save: Save) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "run": self._run, "step": save.step, "start": save.start}

    def _files(self) -> Iterator[tuple[Path, Save, bool, bool]]:
        """Path, save, whether this process owns it, whether it is finished."""
        for path in sorted(self._folder.glob("*")):
            if found := NAME.fullmatch(path.name):
                step, start, process, unfinished = found.groups()
                owned = start != self._start or int(process) == self._process
                yield path, Save(int(step), start), owned, not unfinished


def write(path: Path, pieces: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    digests = {name: digest.of_array(data) for name, data in pieces.items()}
    text = np.frombuffer(json.dumps({**about, "digests": digests}).encode(), np.uint8)
    names = sorted(pieces, key=lambda name: -pieces[name].dtype.itemsize)  # each starts at a multiple of its element
    write_file(path, {**{name: pieces[name] for name in names}, ABOUT: text})


def read(path: Path, about: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The pieces that are as they were written; none if the file is not ``about`` that, damaged, or gone."""
    try:
        pieces = safetensors.read(path)
        found = json.loads(pieces.pop(ABOUT).tobytes())
        digests = found.pop("digests")
        if found != about:
            return {}
        with ThreadPoolExecutor(THREADS) as threads:
            whole = threads.map(lambda name: digest.of_array(pieces[name]) == digests.get(name), pieces)
            return {name: pieces[name] for name, is_whole in zip(list(pieces), whole, strict=True) if is_whole}
    except (UserError, OSError, ValueError, KeyError, AttributeError):
        return {}
