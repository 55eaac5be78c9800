"""Files with two writers; and of a web server that answers in parts, fails, or sends more than it is asked for."""

from __future__ import annotations

import functools
import http.server
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kimi_jax.checkpoint import paths
from kimi_jax.errors import UserError

CONTENT = bytes(range(256))


class Handler(http.server.BaseHTTPRequestHandler):
    """A GET has the first of ``plan``, or the last again: "parts", "whole", "cut", "unsized" or "500"."""

    plan: list[str]

    def do_GET(self):
        how = self.plan.pop(0) if self.plan[1:] else self.plan[0]
        start, end = re.findall(r"\d+", self.headers.get("Range", "")) or (0, 255)
        part = CONTENT if how == "whole" else CONTENT[int(start) : int(end) + 1]
        if how == "500":
            self.send_error(500)
            return
        self.send_response(200 if how == "whole" else 206)
        if how != "unsized":
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:3] if how == "cut" else part)

    def log_message(self, *_):
        pass


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(paths, "PAUSE_S", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file"
        server.shutdown()


@pytest.mark.parametrize("plan", [["parts"], ["500", "cut", "parts"]])
def test_a_server_may_fail_twice(url, plan):
    Handler.plan = list(plan)
    assert paths.read_bytes(url, 8, 20) == CONTENT[8:20]
    Handler.plan = list(plan)
    assert paths.read_into(url, 8, 12).tobytes() == CONTENT[8:20]


@pytest.mark.parametrize(
    "how, message",
    [
        ("500", "ClientResponseError: 500"),
        ("cut", "ClientPayloadError: "),
        ("whole", r"the server sends no parts of files \(HTTP Range\): download it first"),
    ],
)
def test_what_a_server_does_wrong_is_one_line(url, how, message):
    Handler.plan = [how]
    with pytest.raises(UserError, match=f"^{url}: {message}") as error:
        paths.read_bytes(url, 8, 20)
    assert "\n" not in str(error.value)


def test_a_file_of_unknown_size(url):
    Handler.plan = ["unsized"]
    with pytest.raises(UserError, match=f"^{url}: the server does not tell its size: download it first"):
        paths.size(url)


def test_a_server_that_lists_nothing(url):
    Handler.plan = ["parts"]
    assert paths.sizes(url) == {}


def test_a_folder_of_a_web_server_is_a_folder(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("text")
    serve = functools.partial(Files, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/folder"
        assert paths.names(url) == ["a.txt", "inner"]
        with pytest.raises(UserError, match="a.txt is a file, not a folder"):
            paths.names(url + "/a.txt")
        server.shutdown()


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(paths, "PAUSE_S", 0.01)
    for ask in (paths.read_bytes, paths.is_dir, paths.names):
        with pytest.raises(UserError, match="^http://127.0.0.1:1/x: ClientConnectorError: "):
            ask("http://127.0.0.1:1/x")


@pytest.mark.parametrize(
    "write", [paths.write_bytes, lambda path, data: paths.write_file(path, np.frombuffer(data, np.uint8), 1, ".part")]
)
def test_two_writers_of_one_file(tmp_path, monkeypatch, write):
    """Both have written before one of them gives its file the name; the later one's stays, and nothing else."""
    both, replace = threading.Barrier(2, timeout=10), os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (both.wait(), replace(*names)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, 2 * [str(tmp_path / "file")], [b"one", b"two"]))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes().strip(b"\0") in (b"one", b"two")
