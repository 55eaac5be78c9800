"""A conversion that is killed, anywhere, goes on to the same target; shares of it need nothing but the file system."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kimi_jax.checkpoint import claims, convert, units
from kimi_jax.checkpoint.arrays import Arrays
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.manager import find
from kimi_jax.errors import UserError
from tests.checkpoint.examples import CFG, FP8_CONFIG, quantised, random_tensors, save_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("source") / "hf", quantised(random_tensors()), **FP8_CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """What a conversion that nothing disturbs writes."""
    target = tmp_path_factory.mktemp("whole") / "t"
    from_hf(source, target, "fp8")
    return target


def assert_same_folders(a: Path, b: Path) -> None:
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(a, b, files, shallow=False)[1:] == ([], [])


DIES = """
import os, signal, sys
from kimi_jax.checkpoint import arrays, convert, finish, paths, progress

source, target, where, count = sys.argv[1:]
module, _, name = where.rpartition(".")
owner = eval(module)
calls, original = 0, getattr(owner, name)

def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == abs(int(count)):
        if int(count) < 0:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, dying)
convert.from_hf(source, target, "fp8", workers=1)
"""


@pytest.mark.parametrize(
    "where, count",  # killed before that call, or if negative after it
    [
        ("paths.create", 1),
        ("arrays.Arrays.write_chunk", 1),
        ("arrays.Arrays.write_chunk", -40),
        ("progress.Journal.add", -40),
        ("finish.arrays.finalise", -1),
        ("finish._write_meta", -1),
    ],
)
def test_killed_at_a_moment(tmp_path, source, whole, where, count):
    target = tmp_path / "t"
    died = subprocess.run([sys.executable, "-c", DIES, source, target, where, str(count)], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    if where != "finish._write_meta":
        assert find(target) is None
    found = from_hf(source, target, "fp8")
    assert found["finished"] and found.get("chunks_resumed", 0) == {("progress.Journal.add", -40): 40}.get(
        (where, count), found.get("chunks_resumed", 0)
    )
    assert_same_folders(target, whole)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, source, whole):
    command = [
        sys.executable,
        ROOT / "tools" / "convert_ckpt.py",
        "from-hf",
        source,
        "--dtype",
        "fp8",
        "--workers",
        "2",
    ]
    for attempt in range(20):
        target, kills = tmp_path / str(attempt), 0
        while True:
            process = subprocess.Popen([*command, target], stdout=subprocess.DEVNULL)
            while not target.exists() and process.poll() is None:
                time.sleep(0.001)
            try:
                process.wait(timeout=random.uniform(0, 0.2 + kills))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert process.returncode == 0
        assert_same_folders(target, whole)


def test_damaged_chunks_are_written_again(tmp_path, source, whole, monkeypatch):
    """A chunk cut short, one that is gone, and a wrong byte in the one that was written last."""
    target = tmp_path / "t"
    convert_until(monkeypatch, 60, source, target)
    chunks = sorted((p for p in target.glob("state/*/c/**/*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    chunks[3].write_bytes(chunks[3].read_bytes()[:-1])
    chunks[5].rename(f"{chunks[5]}.__lock")
    last = bytearray(chunks[-1].read_bytes())
    last[0] ^= 1
    chunks[-1].write_bytes(last)
    assert from_hf(source, target, "fp8")["chunks_resumed"] == 60 - 3
    assert_same_folders(target, whole)


def convert_until(monkeypatch, n: int, source: Path, target: Path, workers: int = 1) -> None:
    """Writes ``n`` chunks, then fails."""
    original, calls = Arrays.write_chunk, itertools.count()  # several threads come here

    def write(*args):
        if next(calls) >= n:
            raise UserError("stopped")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Arrays, "write_chunk", write)
        with pytest.raises(UserError, match="stopped"):
            from_hf(source, target, "fp8", workers=workers)


def test_something_else_is_not_continued(tmp_path, source, monkeypatch):
    target = tmp_path / "t"
    convert_until(monkeypatch, 3, source, target, workers=2)
    with pytest.raises(UserError, match="another dtype"):
        from_hf(source, target, "bf16")
    other = save_hf(
        tmp_path / "other", quantised(random_tensors(CFG.replace(vocab_size=41))), CFG.replace(vocab_size=41)
    )
    with pytest.raises(UserError, match="another (source|layout)"):
        from_hf(other, target, "fp8")
    monkeypatch.setattr(units, "CHUNK_BYTES", 1000)
    with pytest.raises(UserError, match="another layout"):
        from_hf(source, target, "fp8")


def test_a_revision_with_the_same_headers_is_another_source(tmp_path, source):
    """Neither what is complete nor what is not is taken for its conversion."""
    tuned = {name: w if "_scale" in name else -w for name, w in quantised(random_tensors()).items()}
    other = save_hf(tmp_path / "other", tuned, **FP8_CONFIG)
    from_hf(source, tmp_path / "t", "fp8")
    with pytest.raises(UserError, match="complete checkpoint of another source"):
        from_hf(other, tmp_path / "t", "fp8")
    from_hf(source, tmp_path / "part", "fp8", (0, 2))
    with pytest.raises(UserError, match="unfinished conversion with another source"):
        from_hf(other, tmp_path / "part", "fp8", (1, 2))


def test_foreign_files_are_left_alone(tmp_path, source):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        from_hf(source, tmp_path / "t", "fp8")
    with pytest.raises(UserError, match="is a file"):
        from_hf(source, tmp_path / "t" / "mine.txt", "fp8")
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["mine.txt"]


def test_shares(tmp_path, source, whole):
    """In any order; the last one finishes, whichever it is; a share that is done has nothing left to do."""
    target = tmp_path / "t"
    for i in (2, 0, 2):
        assert not from_hf(source, target, "fp8", (i, 3))["finished"] and find(target) is None
    assert from_hf(source, target, "fp8", (1, 3))["finished"]
    assert_same_folders(target, whole)


def test_dealt_anew(tmp_path, source, whole):
    """Shares of another number of hosts take what is left."""
    target = tmp_path / "t"
    first = from_hf(source, target, "fp8", (0, 2))
    second = from_hf(source, target, "fp8", (0, 1))
    assert second["chunks_resumed"] == first["chunks"]
    assert_same_folders(target, whole)


def test_shares_at_once(tmp_path, source, whole):
    command = [sys.executable, ROOT / "tools" / "convert_ckpt.py", "from-hf", source, tmp_path / "t", "--dtype", "fp8"]
    both = [subprocess.Popen([*command, "--shard", f"{i}/2"], stdout=subprocess.DEVNULL) for i in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    assert_same_folders(tmp_path / "t", whole)
    reports = [json.loads((tmp_path / f"t.report-{i}-of-2.json").read_text()) for i in (0, 1)]
    assert any(report["finished"] for report in reports)


def test_two_that_end_at_once(tmp_path, source, whole, monkeypatch):
    """While one finishes, another whose share ends says so and goes; one that comes too late finds it done."""
    target = tmp_path / "t"
    assert not from_hf(source, target, "fp8", (0, 2))["finished"]
    original, late = convert.finish.write, []

    def finishing(*args):
        monkeypatch.setattr(convert.finish, "write", original)
        assert not from_hf(source, target, "fp8", (0, 2))["finished"]
        opened = convert.Source.open(source)
        job = convert.Conversion(opened, str(target), convert.make_plan(opened, "fp8"), (0, 2))
        late.append((job, convert.Progress(target, job.job())))
        return original(*args)

    monkeypatch.setattr(convert.finish, "write", finishing)
    digest = from_hf(source, target, "fp8", (1, 2))["digest"]
    assert convert._end(*late[0]) == {"finished": True, "digest": digest}
    assert_same_folders(target, whole)


def test_the_same_share_twice(tmp_path, source):
    """While a process is at work on a share, another is sent away; so is its own second attempt."""
    target = tmp_path / "t"
    seen = []
    original = convert.read_unit

    def reading(*args):
        if not seen:
            seen.append(True)
            with pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ is at work on share 1/2"):
                from_hf(source, target, "fp8", (1, 2))
        return original(*args)

    convert.read_unit = reading
    try:
        from_hf(source, target, "fp8", (1, 2), workers=1)
    finally:
        convert.read_unit = original
    assert seen


@pytest.mark.parametrize(
    "change, alive",
    [
        ({}, True),
        ({"pid": 2**22 + 1}, False),  # above what Linux gives
        ({"began": "1"}, False),  # the id belongs to a later process
        ({"host": "elsewhere"}, True),
        ({"host": "elsewhere", "seen": time.time() - 61}, False),
        ({"host": None}, False),  # half-written
    ],
)
def test_claims_of_the_dead_are_taken_over(tmp_path, change, alive):
    path = tmp_path / "claim.json"
    with claims.Claim(path, "it"):
        holder = json.loads(path.read_text())
    assert not path.exists()
    path.write_text(json.dumps({**holder, "seen": time.time(), **change}) if change != {"host": None} else '{"host')
    if alive:
        with pytest.raises(UserError, match="at work on it"), claims.Claim(path, "it"):
            pass
    else:
        with claims.Claim(path, "it"):
            assert json.loads(path.read_text())["claim"] != holder["claim"]


def test_a_claim_that_was_lost_stops_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    path = tmp_path / "claim.json"
    with claims.Claim(path, "it") as claim:
        claim.check()
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "began": "1", "seen": time.time()}))
        deadline = time.time() + 5
        with pytest.raises(UserError, match="taken over it"):
            while time.time() < deadline:
                claim.check()
    assert path.exists()  # the other's


def test_a_claim_outlives_a_server_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    path, write, failures = tmp_path / "claim.json", claims.paths.write_text, iter(range(2))

    def failing(*args):
        if next(failures, None) is not None:
            raise UserError("500")
        write(*args)

    with claims.Claim(path, "it"):
        first = path.read_text()
        monkeypatch.setattr(claims.paths, "write_text", failing)
        deadline = time.time() + 5
        while path.read_text() == first:
            assert time.time() < deadline


def test_a_process_of_a_cluster_takes_its_own_share(monkeypatch):
    assert convert.default_share() == (0, 1)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.process_index", lambda: 3)
    monkeypatch.setattr("jax.process_count", lambda: 8)
    assert convert.default_share() == (3, 8)


def test_a_journal_that_ends_in_the_middle_of_a_line(tmp_path, source, whole, monkeypatch):
    """As a kill or a full disk leaves it: that unit, and one that was noted on the same line, are done again."""
    target = tmp_path / "t"
    convert_until(monkeypatch, 20, source, target)
    journal = next((target / "progress").glob("journal-*"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:10]) + lines[10][:7] + "".join(lines[11:-1]) + lines[-1][:-4])
    assert from_hf(source, target, "fp8")["chunks_resumed"] == 20 - 3
    assert_same_folders(target, whole)
