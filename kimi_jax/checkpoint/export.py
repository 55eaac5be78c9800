"""``to_hf``: a converted or a training checkpoint as a Hugging Face directory that other engines serve.

    model-00001-of-000NN.safetensors ...   the weights, layer by layer
    config.json, generation_config.json, the tokenizer's files
    model.safetensors.index.json           last: a directory with it is complete

A killed export goes on at the first file that is not there; ``unfinished_export.json`` says of what it is one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_jax.checkpoint import beside_weights, digest, paths
from kimi_jax.checkpoint.outgoing import Outgoing
from kimi_jax.checkpoint.report import Reporter, gib, peak_rss
from kimi_jax.checkpoint.safetensors import INDEX
from kimi_jax.checkpoint.safetensors_writer import Shard, is_complete, plan_shards, write_bytes, write_index, writing
from kimi_jax.checkpoint.threads import for_each
from kimi_jax.checkpoint.weights import CheckpointWeights
from kimi_jax.errors import UserError, os_errors_as

SHARD_SIZE = 5_000_000_000
DTYPES = ("bf16", "fp8")
MARKER = "unfinished_export.json"


def to_hf(
    source: paths.AnyPath,
    target: str | Path,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes ``target`` and returns what was done.

    ``source``: a converted target, a training workdir or one of its steps. ``dtype``: "bf16", "fp8", or None for what
    is stored. For fp8, weights that are fp8 keep their bytes and scales, the other projections are quantised as the
    release was, and all else is bf16 but the router's bias, f32. ``shard_size``: bytes of a file, at most, unless one
    tensor is larger. ``workers`` threads hold some 300 MB each. Raises ``UserError``; a second call continues.
    """
    began = time.monotonic()
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if paths.is_remote(target):
        raise UserError(f"to-hf writes to a local folder, not to {target}: copy it there afterwards")
    if shard_size < 1:
        raise UserError(f"the shard size must be at least 1 byte, not {shard_size}")
    weights, target = CheckpointWeights.open(source), Path(target)
    outgoing = Outgoing.plan(weights, dtype)
    shards = plan_shards(outgoing.tensors(), shard_size)
    job = {"source": identity(weights), "dtype": dtype, "shard_size": shard_size}
    left = []
    with _claimed(target, job) as done:
        if done:
            _check_complete(target, shards)
        else:
            beside = beside_weights.collect(weights, set(outgoing.dtypes.values()))
            left = [shard for shard in shards if not is_complete(target, shard)]
            if len(left) < len(shards):
                print(f"going on: {len(shards) - len(left):,} of {len(shards):,} files are there", flush=True)
            _write_shards(target, left, outgoing, workers or min(4, os.cpu_count() or 1))
            for name, content in beside.items():
                write_bytes(target / name, content)
            write_index(target, shards, kimi_jax=job)
    seconds, written = time.monotonic() - began, sum(shard.data_bytes for shard in left)
    summary = {
        "source": weights.where,
        "target": str(target),
        "dtype": dtype or "as stored",
        "tensors": sum(len(shard.tensors) for shard in shards),
        "bytes": sum(shard.data_bytes for shard in shards),
        "bytes_written": written,
        "files": len(shards),
        "files_written": len(left),
        "seconds": round(seconds, 3),
        "bytes_per_second": round(written / seconds),
        "peak_rss_bytes": peak_rss(),
    }
    print(f"{target} is complete: {gib(summary['bytes'])} in {len(shards):,} files", flush=True)
    return summary


def identity(weights: CheckpointWeights) -> str:
    """A digest that no other checkpoint has: of its meta and of the small files that list its arrays."""
    state = paths.join(weights.where, "state")
    files = {name: paths.read_bytes(paths.join(state, name)).hex() for name in paths.sizes(state)}
    return digest.of_json([weights.meta, files])


def _check_complete(target: Path, shards: list[Shard]) -> None:
    """An export that was complete may have lost a file since."""
    bad = [shard.file for shard in shards if not is_complete(target, shard)]
    if bad:
        raise UserError(
            f"{target / bad[0]} and {len(bad) - 1} other files are missing or damaged: remove {target} and export again"
        )


def _write_shards(target: Path, shards: list[Shard], outgoing: Outgoing, workers: int) -> None:
    reporter = Reporter(f"writing {target}", sum(shard.data_bytes for shard in shards))
    try:
        for shard in shards:
            pieces = outgoing.pieces(shard.tensors)
            with writing(target, shard) as file:
                for_each(lambda piece: reporter.add(outgoing.write(piece, file)), pieces, workers)
    finally:
        reporter.close()


@contextmanager
def _claimed(target: Path, job: dict[str, Any]) -> Iterator[bool]:
    """Makes the target ours for the time being, and yields whether the job is already done.

    A target with another model in it, or with an unfinished export of something else, is refused; so is one that
    another live process writes.
    """
    marker = target / MARKER
    with os_errors_as(f"cannot write {target}"):
        target.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in target.iterdir() if path.name != MARKER]
    if others and not marker.exists():
        if _job_of(target / INDEX) == job:
            yield True
            return
        raise UserError(f"{target} is not empty: remove it or choose another target")
    with os_errors_as(f"cannot write {marker}"):
        file = open(marker, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {target}: wait for it, or end it") from None
        file.seek(0)
        ours, theirs = json.dumps(job), file.read()
        if theirs and theirs != ours:
            raise UserError(f"{target} holds an unfinished export of something else, or with other options: remove it")
        file.write("" if theirs else ours)
        file.flush()
        yield False
        marker.unlink()


def _job_of(index: Path) -> Any:
    """What an export that is complete was one of; None if it was not ours."""
    try:
        return json.loads(index.read_bytes())["metadata"]["kimi_jax"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
