"""The roll call and the watch that follows it, between threads that stand for processes."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kimi_jax.errors import UserError
from kimi_jax.pods.cluster import Cluster
from kimi_jax.pods.peers import Peers
from kimi_jax.pods.roll_call import different, roll_call
from tests.multiprocess.processes import free_port


def call_all(facts: list[dict | None], seconds: float = 20, processes: int | None = None) -> list:
    """What each process gets, or the error that it raises; None in ``facts`` stays away."""
    address = f"localhost:{free_port()}"
    n = processes or len(facts)

    def one(process: int):
        try:
            return roll_call(Cluster(address, process, n), facts[process] or {}, seconds)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, [p for p, there in enumerate(facts) if there is not None]))


def test_all_there_and_equal():
    found = call_all([{"version": "1"}] * 4)
    assert len({tuple(present.hosts) for present in found}) == 1 and len(found[0].hosts) == 4
    assert len({present.mark for present in found}) == 1
    assert sorted(found[0].lines) == [1, 2, 3] and all(list(present.lines) == [0] for present in found[1:])
    found[2].lines[0].send({"hello": 2})
    assert found[0].lines[2].next() == {"hello": 2}


def test_the_one_that_differs_is_named_to_all():
    found = call_all([{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "1", "b": "x"}])
    assert len(set(found)) == 1 and "process 1 (" in found[0] and "differs in b: y, elsewhere x" in found[0]
    found = call_all([{"a": "2"}, {"a": "1"}, {"a": "1"}])
    assert "process 0 (" in found[0] and "differs in a: 2, elsewhere 1" in found[0]
    assert "differs in b: absent, elsewhere 1" in call_all([{"b": "1"}, {}])[1]


def test_the_missing_are_named_to_all():
    found = call_all([{}, None, {}, None], seconds=1)
    assert len(set(found)) == 1 and "process 1, 3 of 4 did not come within 1 s (here: process 0 (" in found[0]
    assert "process 0 did not answer at localhost:" in call_all([None, {}], seconds=0.5)[0]


def test_strangers_are_not_counted():
    """A port scanner and a health check before the others come."""
    address = f"localhost:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, Cluster(address, 0, 2), {}, 20)
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b""):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection(("localhost", int(address.split(":")[1]))) as stranger:
                        stranger.sendall(hello)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        second = roll_call(Cluster(address, 1, 2), {}, 20)
    assert first.result().mark == second.mark


@pytest.mark.parametrize(
    ("values", "odd"),
    [({0: "a", 1: "a"}, []), ({0: "a", 1: "b"}, [1]), ({0: "b", 1: "a", 2: "a"}, [0]), ({1: "a", 0: "b"}, [1])],
)
def test_different(values, odd):
    assert different(values) == odd


class Watched:
    """Peers of three processes; ``ends`` collects what each says when it ends."""

    def __init__(self, heartbeat_seconds: float = 20):
        self.ends: dict[int, tuple[str, bool]] = {}
        self.all = []
        for process, present in enumerate(call_all([{}] * 3)):
            self.all.append(Peers("train", process, present, heartbeat_seconds, self._end(process)))
        for peers in self.all:
            peers.start()

    def _end(self, process: int):
        def end(line: str, stacks: bool) -> None:
            self.ends.setdefault(process, (line, stacks))  # a process ends once
            for connection in self.all[process]._lines.values():
                connection.close()

        return end

    def wait(self, n: int, seconds: float = 15) -> set[tuple[str, bool]]:
        deadline = time.monotonic() + seconds
        while len(self.ends) < n and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.ends) == n, self.ends
        return set(self.ends.values())


def test_a_death_ends_all():
    watched = Watched()
    watched.all[2].at("step 7")
    deadline = time.monotonic() + 10
    while watched.all[0]._where[2] != "step 7" and time.monotonic() < deadline:
        time.sleep(0.01)
    watched.all[2]._lines[0].socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that is killed
    watched.wait(3)
    assert watched.ends[0] == watched.ends[1]
    assert watched.ends[0][0].startswith("train: process 2 (") and watched.ends[0][0].endswith("died at step 7")


@pytest.mark.parametrize("process", [0, 1])
def test_a_failure_ends_all_with_its_reason(process):
    watched = Watched()
    threading.Thread(target=watched.all[process].fail, args=("no such file",)).start()
    (line, stacks), *others = watched.wait(3)
    assert not others and not stacks
    assert line.startswith(f"train: process {process} (") and line.endswith("): no such file")


@pytest.mark.parametrize("process", [0, 2])
def test_a_hang_names_the_one_that_is_behind(process):
    watched = Watched()
    for i, peers in enumerate(watched.all):
        peers.at("step 8" if i == 1 else "step 9")
    deadline = time.monotonic() + 10
    while list(watched.all[0]._where.values()) != ["step 9", "step 8", "step 9"] and time.monotonic() < deadline:
        time.sleep(0.01)
    threading.Thread(target=watched.all[process].hang, args=("step 9 has not ended within 5 s",)).start()
    (line, stacks), *others = watched.wait(3)
    assert not others and stacks
    assert "step 9 has not ended within 5 s: process 1 (" in line and " at step 8; process 0 (" in line


def test_a_hang_names_who_is_silent(monkeypatch):
    monkeypatch.setattr("kimi_jax.pods.peers.SILENCE", 1.0)
    watched = Watched()
    monkeypatch.setattr(watched.all[2], "_tell", lambda message: None)
    time.sleep(2.5)
    threading.Thread(target=watched.all[1].hang, args=("step 1 has not ended within 5 s",)).start()
    (line, _), *others = watched.wait(3)
    assert not others and ") at the start but silent; process 0 (" in line and line.index("process 2") < 60


def test_silence_is_death(monkeypatch):
    watched = Watched(heartbeat_seconds=1)
    monkeypatch.setattr(watched.all[1], "_tell", lambda message: None)
    watched.wait(3)
    assert "train: process 1 (" in watched.ends[2][0] and "has been silent for" in watched.ends[2][0]


def test_who_is_done_may_go():
    watched = Watched()
    for peers in watched.all:
        peers.done()
    for process in (1, 0, 2):
        watched.all[process].close()
    time.sleep(0.1)
    assert not watched.ends
