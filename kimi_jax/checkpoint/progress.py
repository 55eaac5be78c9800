"""What an unfinished conversion has done, so that it can go on after a kill.

    TARGET/progress/job.json           what is converted, and how: a conversion of anything else is refused
    TARGET/progress/journal-*.jsonl    one line [unit, digest] for every chunk that is written, a file for every process
    TARGET/progress/claim-*.json       the shares that live processes work on

A line follows the chunk that it stands for. Which process wrote it does not matter: the work may be dealt anew.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from kimi_jax.checkpoint import paths
from kimi_jax.checkpoint.claims import Claim
from kimi_jax.errors import UserError

FOLDER = "progress"
FLUSH_S = 5.0  # between two writes of a journal to an object store, which cannot append
LAST = 4  # units of each journal whose bytes are compared: the others had time to reach the disk


class Progress:
    """The progress folder of one target, begun or found there."""

    def __init__(self, target: paths.AnyPath, job: Mapping[str, Any]):
        self._folder = paths.join(target, FOLDER)
        self._job = dict(job)
        path = paths.join(self._folder, "job.json")
        if not paths.create(path, json.dumps(self._job)) and (found := paths.read_json(path)) != self._job:
            what = next((key for key in self._job if found.get(key) != self._job[key]), "job")
            raise UserError(
                f"{target} holds an unfinished conversion with another {what}: repeat that command, "
                "or remove the folder, or name another target"
            )

    def claim_share(self, i: int, n: int) -> Claim:
        return Claim(paths.join(self._folder, f"claim-{i}-of-{n}.json"), f"share {i}/{n} of this target")

    def claim_end(self) -> Claim:
        return Claim(paths.join(self._folder, "claim-end.json"), "the end of this conversion")

    def journal(self, i: int, n: int) -> Journal:
        """A new journal for a process."""
        return Journal(paths.join(self._folder, f"journal-{i}-of-{n}-{uuid.uuid4().hex[:12]}.jsonl"))

    def done(self) -> tuple[dict[int, str], set[int]]:
        """Digest of every unit that a journal names; and the units that were the last of theirs."""
        done: dict[int, str] = {}
        last: set[int] = set()
        for name in paths.sizes(self._folder):
            if name.startswith("journal-"):
                lines = _lines(paths.read_text(paths.join(self._folder, name)))
                done.update(lines)
                last.update(unit for unit, _ in lines[-LAST:])
        return done, last

    def remove(self) -> None:
        paths.remove(self._folder)


class Journal:
    """Lines that are in the file when ``add`` returns; in an object store a few seconds later."""

    def __init__(self, path: str):
        self._path, self._lock, self._lines, self._written = path, threading.Lock(), [], time.monotonic()
        self._fd = -1 if paths.is_remote(path) else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def add(self, unit: int, digest: str) -> None:
        line = json.dumps([unit, digest]) + "\n"
        with self._lock:
            if self._fd >= 0:
                if os.write(self._fd, line.encode()) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
                return
            self._lines.append(line)
            if time.monotonic() - self._written > FLUSH_S:
                self._flush()

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            elif self._lines:
                self._flush()

    def _flush(self) -> None:
        paths.write_text(self._path, "".join(self._lines))
        self._written = time.monotonic()


def _lines(text: str) -> list[tuple[int, str]]:
    """The complete lines: a kill or a full disk may have cut one, and its unit is done again."""
    found = []
    for line in text.splitlines():
        try:
            unit, digest = json.loads(line)
            found.append((int(unit), str(digest)))
        except (ValueError, TypeError):
            continue
    return found


def unfinished(target: paths.AnyPath) -> bool:
    return paths.exists(paths.join(target, FOLDER, "job.json"))
