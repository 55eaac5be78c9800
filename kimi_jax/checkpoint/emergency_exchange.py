"""What the processes of a start agree on: whose local copies count, from which step to go on, who lacks which piece.

    WORKDIR/emergency/history.json            the run, its last start, and the save that this start went on from
    WORKDIR/emergency/<start>/have-<p>.json   the pieces that process p found on its host
    WORKDIR/emergency/<start>/<p>-to-<q>.safetensors   the pieces that q lacks and p gives it

All read the same lists and so decide alike. A kill at any moment leaves the history that was: the new one is written
when everybody has its state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_jax.checkpoint import emergency
from kimi_jax.checkpoint.emergency import Save
from kimi_jax.checkpoint.pieces import leaf_of
from kimi_jax.checkpoint.safetensors_writer import write_bytes
from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.errors import UserError

FOLDER, HISTORY = "emergency", "history.json"
Having = dict[Save, set[str]]  # save -> pieces


class History(NamedTuple):
    """Which saves belong to the run as it went: those of its last start, and the one that this went on from."""

    run: str
    start: str
    resumed: Save | None

    def holds(self, save: Save) -> bool:
        return save.start == self.start or save == self.resumed


def read_history(workdir: Path) -> History | None:
    path = workdir / FOLDER / HISTORY
    try:
        found = json.loads(path.read_text())
        if found["format_version"] != FORMAT_VERSION:
            return None
        return History(found["run"], found["start"], found["resumed"] and Save(*found["resumed"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to go on from the last checkpoint") from error


def forget(workdir: Path) -> None:
    """A start that keeps no copies makes those of earlier ones void: it may go another way, past their steps."""
    (workdir / FOLDER / HISTORY).unlink(missing_ok=True)


class Exchange:
    """One start's folder in the shared workdir. ``meet`` waits for all processes."""

    def __init__(self, workdir: Path, start: str, process: int, processes: int, meet: Callable[[], None]):
        self._root, self._folder, self._start = workdir / FOLDER, workdir / FOLDER / start, start
        self._process, self._processes, self._meet = process, processes, meet

    def lists(self, having: Having) -> list[Having]:
        """What every process has."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = [[*save, sorted(pieces)] for save, pieces in having.items()]
        write_bytes(self._folder / f"have-{self._process}.json", json.dumps(mine).encode())
        self._meet()
        texts = [(self._folder / f"have-{process}.json").read_text() for process in range(self._processes)]
        return [{Save(step, start): set(pieces) for step, start, pieces in json.loads(text)} for text in texts]

    def completed(
        self, pieces: Mapping[str, np.ndarray], have: Sequence[set[str]], need: Mapping[int, set[str]]
    ) -> dict[str, np.ndarray]:
        """``pieces`` and those that this process lacks, from others; it gives what they lack."""
        gifts = transfers(have, need)
        for (donor, receiver), names in gifts.items():
            if donor == self._process:
                given = {name: pieces[name] for name in names}
                emergency.write(self._folder / f"{donor}-to-{receiver}.safetensors", given, self._about)
        self._meet()
        found = dict(pieces)
        for (donor, receiver), names in gifts.items():
            if receiver == self._process:
                path = self._folder / f"{donor}-to-{receiver}.safetensors"
                found |= (given := emergency.read(path, self._about))
                if not given.keys() >= set(names):
                    raise UserError(f"{path} was damaged on its way: start again")
        return found

    def close(self, history: History) -> None:
        """When all have what they need: process 0 writes down what happened, and removes what travelled."""
        self._meet()
        if self._process:
            return
        write_bytes(self._root / HISTORY, json.dumps({"format_version": FORMAT_VERSION, **history._asdict()}).encode())
        for folder in self._root.iterdir():  # of starts that were killed, too
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _about(self) -> dict[str, object]:
        return {"format_version": FORMAT_VERSION, "start": self._start}


def choose(lists: Sequence[Having], need: Mapping[int, set[str]]) -> tuple[Save | None, str]:
    """The newest save whose pieces make the whole state; or why the newest does not."""
    wanted, why = set().union(*need.values()), ""
    for save in sorted(set().union(*lists), reverse=True):
        there = set().union(*(having.get(save, set()) for having in lists))
        missing = sorted(wanted - there)
        foreign = sorted({leaf_of(piece) for piece in there} - {leaf_of(piece) for piece in wanted})
        if not missing and not foreign:
            return save, ""
        lacks = f"{len(missing)} of {len(wanted)} pieces are missing, such as {missing[0]}" if missing else ""
        why = why or f"the local copies of step {save.step} are not used: {lacks or f'they also hold {foreign[0]}'}"
    return None, why


def transfers(have: Sequence[set[str]], need: Mapping[int, set[str]]) -> dict[tuple[int, int], list[str]]:
    """(donor, receiver) -> pieces: of every piece that a process needs and lacks, one process that has it, in turn."""
    found: dict[tuple[int, int], list[str]] = {}
    for receiver, needed in sorted(need.items()):
        for i, piece in enumerate(sorted(needed - have[receiver])):
            donors = [process for process, pieces in enumerate(have) if piece in pieces]
            found.setdefault((donors[i % len(donors)], receiver), []).append(piece)
    return found
