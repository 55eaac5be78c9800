"""From a Hugging Face directory to a checkpoint that ``load``, training and generation read: one pass, bounded memory.

TARGET/state/      the arrays, as Orbax lays them out (``arrays.py``): params.* and, of fp8 weights, scales.*
TARGET/hf/         config.json, tokenizer and chat template, as they came
TARGET/progress/   journals and claims, while the conversion is under way
TARGET/meta/       JSON, written last: without it nothing reads the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kimi_jax.checkpoint import arrays, digest, finish, paths
from kimi_jax.checkpoint.arrays import UNFINISHED, Arrays
from kimi_jax.checkpoint.claims import TakenError
from kimi_jax.checkpoint.progress import FOLDER, Progress, unfinished
from kimi_jax.checkpoint.report import Reporter, gib, peak_rss
from kimi_jax.checkpoint.source import Source
from kimi_jax.checkpoint.threads import for_each
from kimi_jax.checkpoint.units import Plan, Unit, make_plan
from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.errors import UserError


@dataclass(frozen=True)
class Conversion:
    """What is converted, where to, and this process's share of the work."""

    source: Source
    target: str
    plan: Plan
    share: tuple[int, int] = (0, 1)
    workers: int = 2

    @property
    def state(self) -> str:
        return paths.join(self.target, "state")

    def job(self) -> dict[str, Any]:
        """What all processes that work on one target must agree on."""
        layout = [[name, str(s.dtype), s.shape, s.chunk, s.order] for name, s in self.plan.arrays.items()]
        return {
            "format version": FORMAT_VERSION,
            "dtype": self.plan.dtype,
            "source": self.source.digest(),
            "layout": digest.of_json(layout),
        }


def from_hf(
    source: paths.AnyPath, target: paths.AnyPath, dtype: str, share: tuple[int, int] = (0, 1), workers: int = 2
) -> dict[str, Any]:
    """Converts a share of the work, and finishes the target if no other share is open; gives the report."""
    target = str(target).removeprefix("file://").rstrip("/")
    with readable_errors(target):
        opened = Source.open(source)
        job = Conversion(opened, target, make_plan(opened, dtype), share, workers)
        manifest = finish.read(target)
        if manifest is not None:
            found = _already_there(job, manifest)
        else:
            _refuse_foreign(target)
            try:
                progress = Progress(target, job.job())
                with progress.claim_share(*share) as claim:
                    found = _convert(job, progress, claim.check)
                found |= _end(job, progress)
            except (UserError, OSError):  # another share may have finished the target, and the journals are gone
                if (manifest := finish.read(target)) is None:
                    raise
                found = _already_there(job, manifest)
    asked = {"source": str(source), "target": target, "dtype": dtype, "share": list(share), "workers": workers}
    return asked | found | {"peak_rss_bytes": peak_rss()}


def default_share() -> tuple[int, int]:
    """One share for each process of ``jax.distributed``, where that is initialised."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def _convert(job: Conversion, progress: Progress, check: Callable[[], None]) -> dict[str, Any]:
    """Writes the units of this share that are not there yet."""
    target = Arrays.create(job.state, job.plan.arrays)
    done = _still_there(job, progress, target)
    mine = job.plan.share(*job.share)
    todo = [unit for unit in mine if unit.number not in done]
    if len(todo) < len(mine):
        print(f"going on: {len(mine) - len(todo):,} of {len(mine):,} chunks are there", flush=True)
    reporter = Reporter(f"converting to {job.plan.dtype}", sum(unit.nbytes for unit in todo))
    journal = progress.journal(*job.share)

    def convert(unit: Unit) -> None:
        check()
        journal.add(unit.number, _write(job.source, target, unit))
        reporter.add(unit.nbytes)

    try:
        for_each(convert, todo, job.workers)
    finally:
        journal.close()
        reporter.close()
    return {
        "chunks": len(mine),
        "chunks_resumed": len(mine) - len(todo),
        "bytes_read": sum(unit.source_bytes for unit in todo),
        "bytes_written": reporter.bytes,
        "seconds": round(reporter.seconds, 3),
        "bytes_per_second": round(reporter.bytes / max(reporter.seconds, 1e-9)),
    }


def _write(source: Source, target: Arrays, unit: Unit) -> str:
    """One unit from the source to the target; the digest of its bytes."""
    data = read_unit(source, unit, target.dtype(unit.array))
    try:
        target.write_chunk(unit.array, unit.cell, data)
    except UserError as error:
        raise UserError(f"cannot write {unit.entries[0].name} to {error}") from error
    return digest.of_array(data)


def read_unit(source: Source, unit: Unit, dtype: np.dtype) -> np.ndarray:
    """The bytes of a chunk, in the order of its file."""
    if unit.stop:
        return source.rows(unit.entries[0], unit.start, unit.stop, dtype)
    return np.stack([source.scale(entry) for entry in unit.entries])


def _still_there(job: Conversion, progress: Progress, target: Arrays) -> set[int]:
    """The units of the journals whose chunks have their full size, and of the last ones the right bytes too."""
    done, last = progress.done()
    sizes = paths.sizes(job.state, deep=True) if done else {}
    found = set()
    for unit in job.plan.units:
        if unit.number in done and _has_size(job, unit, sizes):
            expected = done[unit.number]
            if unit.number not in last or digest.of_array(target.read_chunk(unit.array, unit.cell)) == expected:
                found.add(unit.number)
    return found


def _has_size(job: Conversion, unit: Unit, sizes: dict[str, int]) -> bool:
    return sizes.get(arrays.chunk_file(unit.array, unit.cell)) == job.plan.arrays[unit.array].chunk_bytes


def _end(job: Conversion, progress: Progress) -> dict[str, Any]:
    """Finishes the target if every chunk of every share is there and nobody else does so."""
    share = f"share {job.share[0]}/{job.share[1]} is complete"
    try:
        done, _ = progress.done()
        missing = len(job.plan.units) - len(done)
        if missing and finish.read(job.target) is None:
            print(f"{share}; other shares lack {missing:,} chunks", flush=True)
            return {"finished": False}
        with progress.claim_end():
            manifest = finish.read(job.target) or _finish(job, done)
    except TakenError:
        print(f"{share}; another process finishes {job.target}", flush=True)
        return {"finished": False}
    except FileNotFoundError:  # another process has finished, and the journals are gone
        if (manifest := finish.read(job.target)) is None:
            raise
    progress.remove()
    print(f"{job.target} is complete: {gib(job.plan.nbytes)}, digest {manifest['digest']}", flush=True)
    return {"finished": True, "digest": manifest["digest"]}


def _finish(job: Conversion, digests: dict[int, str]) -> dict[str, Any]:
    """Checks that all chunks have their full size, and writes what makes the target complete: the manifest."""
    for name in _whole(job, "run the command again"):
        if name.endswith((UNFINISHED, ".unfinished")):  # of processes that were killed
            paths.remove(paths.join(job.state, name))
    return finish.write(job.source, job.target, job.plan, [digests[unit.number] for unit in job.plan.units])


def _whole(job: Conversion, advice: str) -> dict[str, int]:
    """Bytes of every file of the state, once every chunk is there in its full size."""
    sizes = paths.sizes(job.state, deep=True)
    bad = [unit for unit in job.plan.units if not _has_size(job, unit, sizes)]
    if bad:
        where = paths.join(job.state, arrays.chunk_file(bad[0].array, bad[0].cell))
        raise UserError(f"{where} and {len(bad) - 1} other chunks are missing or damaged: {advice}")
    return sizes


def _already_there(job: Conversion, manifest: dict[str, Any]) -> dict[str, Any]:
    if (manifest.get("dtype"), manifest.get("source", {}).get("digest")) != (
        finish.stored_dtype(job.plan),
        job.source.digest(),
    ):
        raise UserError(f"{job.target} is a complete checkpoint of another source or dtype: name another target")
    Arrays.open(job.state)
    _whole(job, f"remove {job.target} and convert again")
    paths.remove(paths.join(job.target, FOLDER))
    print(f"{job.target} is complete already", flush=True)
    return {"finished": True, "digest": manifest["digest"]}


def _refuse_foreign(target: str) -> None:
    """Nothing is ever written among files that no conversion made."""
    names = paths.names(target)
    if set(names) - {FOLDER} and not unfinished(target):
        raise UserError(f"{target} is not empty and no unfinished conversion: name another target")


@contextmanager
def readable_errors(target: str) -> Iterator[None]:
    """A full disk, a missing permission and the like as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
