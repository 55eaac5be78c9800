"""Where documents come from: files of four formats, or the source text of the running Python's standard library.

A document has a name that stays the same when other files come or go, and when the corpus moves: the path below the
source's directory, and for files of many documents ``#row`` after it. The held-out split hashes that name.
"""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from kimi_jax.errors import UserError, os_errors_as

STDLIB = "stdlib"
ROWS = 256  # of a Parquet file that are held at a time


@dataclass(frozen=True)
class SourceConfig:
    """Files of text. In a config, a plain string stands for a source of that path.

    ``path``: a file, a glob, or a directory: all files below it, through links too, but hidden ones. ``"stdlib"`` is
    the embedded corpus.
    ``weight``: share of the training sequences, relative to the other sources.
    ``format``: a key of ``FORMATS``; ``None`` goes by each file's suffix, ``text`` (one document per file) if unknown.
    ``key``: the field (JSONL) or column (Parquet) that holds the text.
    """

    path: str
    weight: float = 1.0
    format: str | None = None
    key: str = "text"

    def __post_init__(self):
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(f"the weight of data source {self.path} must be above 0, not {self.weight}")
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"unknown format {self.format!r} of data source {self.path}; use {', '.join(FORMATS)}")

    @classmethod
    def from_string(cls, path: str) -> SourceConfig:
        return cls(path)


class Document(NamedTuple):
    name: str
    text: str


class File(NamedTuple):
    name: str  # below the source's directory, with forward slashes
    path: Path
    format: str


def files(source: SourceConfig) -> list[File]:
    """The files of a source in the order of their names; ``UserError`` if there is none."""
    if source.path == STDLIB:
        return _stdlib_files()
    path = os.path.expanduser(source.path)
    if os.path.exists(path):
        base, found = (path, [path]) if os.path.isdir(path) else (os.path.dirname(path), [path])
    else:
        base = os.path.join("", *takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
        found = glob.glob(path, recursive=True)
        found = _once(found, base or ".") if "**" in path else found
    below = {file for path in found for file in (_files_below(path) if os.path.isdir(path) else [path])}
    if not below:
        raise UserError(f"no file matches data source {source.path}")
    named = sorted((Path(os.path.relpath(file, base or ".")).as_posix(), Path(file)) for file in below)
    return [File(name, path, source.format or SUFFIXES.get(path.suffix.lower(), "text")) for name, path in named]


def documents(source: SourceConfig) -> Iterator[Document]:
    """The non-empty documents of a source, always in the same order."""
    for file in files(source):
        with os_errors_as(f"cannot read {file.path}"):
            for row, text in enumerate(FORMATS[file.format](file.path, source.key)):
                if text:
                    yield Document(file.name if file.format == "text" else f"{file.name}#{row}", text)


def split(documents: Iterable[Document], holdout: float, held_out: bool) -> Iterator[Document]:
    """The training part, or the held-out part, of ``documents``.

    A document is held out if the hash of its name, uniform in [0, 1), lies below ``holdout``: adding or removing others
    never moves it. If that would leave nothing to train on, nothing is held out.
    """
    early: list[Document] = []  # held out, unless no training document follows
    training = False
    for document in documents:
        digest = hashlib.blake2b(document.name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        if int.from_bytes(digest, "big") >= holdout * 2**64:
            training = True
            yield from early if held_out else (document,)
            early.clear()
        elif not training:
            early.append(document)
        elif held_out:
            yield document
    if not held_out and not training:
        yield from early


def _once(found: Iterable[str], base: str) -> Iterator[str]:
    """The files of ``found`` and below its folders, but those that ``**`` finds again after a circle of links."""

    @functools.cache
    def in_circle(folder: str) -> bool:
        """Whether the way from ``base`` to ``folder`` comes to one folder twice."""
        way = accumulate(Path(os.path.relpath(folder or ".", base)).parts, os.path.join, initial=base)
        visited = [os.path.realpath(place) for place in way]
        return len(set(visited)) < len(visited)

    for path in found:
        if not os.path.isdir(path):
            files = [path]
        elif in_circle(path):
            continue
        else:
            files = _files_below(path)
        yield from (file for file in files if not in_circle(os.path.dirname(file)))


def _files_below(directory: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Links to folders are followed, except to ``directory`` itself and to those ``above`` that led to it."""
    with os_errors_as(f"cannot read {directory}"):
        there = [(entry.path, entry.is_dir()) for entry in os.scandir(directory) if not entry.name.startswith(".")]
    above = (*above, os.path.realpath(directory))
    for path, is_folder in there:
        if not is_folder:
            yield path
        elif os.path.realpath(path) not in above:
            yield from _files_below(path, above)


# Tests, bundled applications, and modules that are tables or generated text rather than programs.
_NOT_PROGRAMS = {"__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}


def _stdlib_files() -> list[File]:
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root):
        # Only importable packages: no site-packages, dist-packages, lib-dynload, config-*.
        folders[:] = [name for name in folders if name.isidentifier() and name not in _NOT_PROGRAMS]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found.append(File(path.relative_to(root).as_posix(), path, "text"))
    if not found:
        raise UserError(f"this Python has no standard library sources in {root}; set data.sources to files of your own")
    return sorted(found)


def _decode(data: bytes, where: object) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start})") from error


def _text(value: Any, key: str, where: str) -> str:
    """The text in ``value``, which stands under ``key`` of a record."""
    if isinstance(value, bytes):
        return _decode(value, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, not text; set the source's key")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {key!r} holds half a surrogate pair, which is not text")
    return value


def _read_text(path: Path, key: str) -> Iterator[str]:
    yield _decode(path.read_bytes(), path)


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{path}:{number}"
            text = _decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not valid JSON: {error}") from error
            if not isinstance(record, dict) or key not in record:
                raise UserError(f"{where} has no field {key!r}; set the source's key")
            yield _text(record[key], key, where)


def _read_parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {key!r}; it has {', '.join(file.schema_arrow.names)}")
            batches = file.iter_batches(ROWS, columns=[key])
            for row, value in enumerate(value for batch in batches for value in batch.column(0).to_pylist()):
                yield _text(value, key, f"{path} row {row}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: column {key!r} holds bytes that are not UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _read_array_record(path: Path, key: str) -> Iterator[str]:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():  # it opens anything, and then holds no record
        raise UserError(f"{path} is not a readable ArrayRecord file")
    for row in range(reader.num_records()):
        try:
            record = reader.read()
        except RuntimeError as error:
            raise UserError(f"{path} record {row} is damaged: {str(error).splitlines()[0]}") from error
        yield _decode(record, f"{path} record {row}")


FORMATS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
}
SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".array_record": "array_record", ".arrayrecord": "array_record"}
