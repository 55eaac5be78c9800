"""Files that may be local or in an object store: gs://, s3:// and whatever else fsspec knows.

Small files go through fsspec; arrays through TensorStore (``kvstore``). The standard variables apply to both, such as
AWS_ENDPOINT_URL and AWS_REGION for an S3 service of one's own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.core
import numpy as np

from kimi_jax.errors import UserError, os_errors_as

AnyPath = str | Path
TRIES, PAUSE_S = 3, 1.0  # of a server that fails, and between them


def is_remote(path: AnyPath) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def local(path: str) -> str:
    """A path as somebody types it: without file://, and ~ as the home folder. URLs stay."""
    return path if is_remote(path) else os.path.expanduser(path.removeprefix("file://"))


def join(folder: AnyPath, *names: str) -> str:
    return "/".join((str(folder).rstrip("/"), *names))


def name(path: AnyPath) -> str:
    return str(path).rstrip("/").rpartition("/")[2]


def exists(path: AnyPath) -> bool:
    fs, inner = _open_fs(path)
    return _asked(path, lambda: fs.exists(inner))


def is_dir(path: AnyPath) -> bool:
    fs, inner = _open_fs(path)
    return _asked(path, lambda: fs.isdir(inner))


def size(path: AnyPath) -> int:
    """Bytes of a file. Raises OSError."""
    fs, inner = _open_fs(path)
    found = _asked(path, lambda: fs.size(inner))
    if found is None:
        raise UserError(f"{path}: the server does not tell its size: download it first")
    return found


def names(folder: AnyPath) -> list[str]:
    """What lies in a folder, folders too; empty if there is none."""
    fs, inner = _open_fs(folder)
    fs.invalidate_cache()
    if fs.isfile(inner) and not fs.isdir(inner):  # a folder of a web server is also a file
        raise UserError(f"{folder} is a file, not a folder")
    found = _asked(folder, lambda: fs.ls(inner, detail=False) if fs.isdir(inner) else [])
    return sorted(map(name, found))


def sizes(folder: AnyPath, deep: bool = False) -> dict[str, int]:
    """Bytes of every file of a folder, by name; with ``deep`` of its folders too. Empty if there is no folder.

    Links count as what they lead to: a snapshot in the cache of the Hugging Face hub is nothing else.
    """
    fs, inner = _open_fs(folder)
    fs.invalidate_cache()
    root = fs._strip_protocol(inner).rstrip("/") + "/"
    found = _asked(folder, lambda: fs.find(inner, maxdepth=None if deep else 1, detail=True))
    found.pop(root.removesuffix("/"), None)  # of a file, or of a server that lists nothing
    files = {path: info["size"] for path, info in sorted(found.items()) if info["type"] == "file" or fs.isfile(path)}
    return {path.removeprefix(root): size for path, size in files.items()}


def read_bytes(path: AnyPath, start: int | None = None, end: int | None = None) -> bytes:
    """A file, or its bytes start..end. Raises OSError."""
    fs, inner = _open_fs(path)
    data = _asked(path, lambda: fs.cat_file(inner, start=start, end=end))
    if end is not None and len(data) > end - (start or 0):
        raise UserError(f"{path}: the server sends no parts of files (HTTP Range): download it first")
    return data


def read_into(path: AnyPath, start: int, size: int) -> np.ndarray:
    """``size`` bytes of a file from ``start`` in memory of their own, fewer if it ends before. Raises OSError.

    No memory map: mapped pages would count as the process's own, and a file cut short would kill it.
    """
    if is_remote(path):
        return np.frombuffer(read_bytes(path, start, start + size), np.uint8)
    data, done = np.empty(size, np.uint8), 0
    with open(str(path).removeprefix("file://"), "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_SEQUENTIAL)
        while done < size:
            n = os.preadv(file.fileno(), [data[done:]], start + done)
            if n == 0:
                return data[:done]
            done += n
    return data


def read_text(path: AnyPath) -> str:
    return read_bytes(path).decode("utf-8")


def read_json(path: AnyPath) -> Any:
    """Raises ``UserError`` if the file cannot be read or is no JSON."""
    with os_errors_as(f"cannot read {path}"):
        content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def write_bytes(path: AnyPath, data: bytes) -> None:
    """The file appears when it is complete."""
    fs, inner = _open_fs(path)
    if is_remote(path):
        fs.pipe_file(inner, data)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(_unfinished(inner))
    unfinished.write_bytes(data)
    unfinished.replace(target)


def write_file(path: str, data: np.ndarray, zeros: int, suffix: str) -> None:
    """Writes a large local file: ``data`` and some zeros, under a name that ends in ``suffix`` until it is complete."""
    unfinished, flags = _unfinished(path, suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        file = os.open(unfinished, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = os.open(unfinished, flags, 0o666)
    try:
        for part in (memoryview(data.reshape(-1).view(np.uint8)), memoryview(bytes(zeros))):
            while part:
                part = part[os.write(file, part) :]
    finally:
        os.close(file)
    os.replace(unfinished, path)


def write_text(path: AnyPath, text: str) -> None:
    write_bytes(path, text.encode())


def create(path: AnyPath, text: str) -> bool:
    """Writes the file, whole, if there is none; says whether it did. Of several writers exactly one hears True."""
    fs, inner = _open_fs(path)
    try:
        if is_remote(path):
            fs.pipe_file(inner, text.encode(), mode="create")
            return True
        target = Path(inner)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(_unfinished(inner))
        unfinished.write_text(text, encoding="utf-8")
        try:
            os.link(unfinished, target)
        finally:
            unfinished.unlink()
    except FileExistsError:
        return False
    return True


def remove(path: AnyPath) -> None:
    """Removes a file or a folder, if it is there; another process may be doing so too."""
    fs, inner = _open_fs(path)
    fs.invalidate_cache()
    if fs.exists(inner):
        with contextlib.suppress(FileNotFoundError):
            fs.rm(inner, recursive=True)


def kvstore(folder: AnyPath) -> dict[str, Any]:
    """TensorStore's description of a folder."""
    text = str(folder).rstrip("/")
    if not is_remote(text):
        return {"driver": "file", "path": os.path.abspath(text.removeprefix("file://")) + "/"}
    url = urlsplit(text)
    where = {"bucket": url.netloc, "path": url.path.lstrip("/") + "/"}
    if url.scheme in ("gs", "gcs"):
        return {"driver": "gcs", **where}
    if url.scheme in ("s3", "s3a"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        chosen = {"endpoint": endpoint} if endpoint else {}
        if region:
            chosen["aws_region"] = region
        return {"driver": "s3", **where, **chosen}
    raise UserError(f"arrays cannot be kept at {folder}: use a local folder, gs:// or s3://")


def reason(error: Exception) -> str:
    """What TensorStore says, in short: the system's own words, if they are why."""
    first = str(error).partition("\n")[0].partition(" [")[0]
    last = first.rpartition(": ")[2]
    return last if last in map(os.strerror, errno.errorcode) else first[:300]


def _unfinished(path: str, suffix: str = ".unfinished") -> str:
    """A name beside the file that no other writer has."""
    return f"{path}.{os.getpid()}.{threading.get_ident()}{suffix}"


def _asked(path: AnyPath, ask: Callable[[], Any]) -> Any:
    """What a file system answers. A server that fails, with whatever its client raises, is asked TRIES times."""
    for left in reversed(range(TRIES)):
        try:
            return ask()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except Exception as error:
            if not is_remote(path):
                raise
            if not left:
                raise UserError(f"{path}: {type(error).__name__}: {error}") from error
            time.sleep(PAUSE_S)


def _open_fs(path: AnyPath) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(str(path))
    except ImportError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
