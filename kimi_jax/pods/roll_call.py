"""The roll call before JAX starts: is every process there, once, and about to do the same thing?

Process 0 listens at the coordinator's address; the others connect, say who they are and what they know, and hear what
came of it. Then the address is left to JAX, which aborts without a name when a process is missing. The connections
stay: see ``peers``.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from kimi_jax.errors import UserError
from kimi_jax.pods.cluster import Cluster
from kimi_jax.pods.wire import Line, Message

Facts = Mapping[str, str]  # what has to be equal everywhere: versions, the config, ...


class Present(NamedTuple):
    """What all know after the roll call, and the connections: process 0 has one to each other, they to process 0."""

    hosts: list[str]
    mark: str  # of this start, the same everywhere and no other time
    lines: dict[int, Line]


def roll_call(cluster: Cluster, facts: Facts, seconds: float) -> Present:
    """Returns on all processes, or raises on all processes, after ``seconds`` at most: ``UserError`` names the odd."""
    me: Message = {"process": cluster.process, "host": socket.gethostname(), "facts": dict(facts)}
    deadline = time.monotonic() + seconds
    return _call(cluster, me, deadline, seconds) if cluster.process == 0 else _answer(cluster, me, deadline, seconds)


def _call(cluster: Cluster, me: Message, deadline: float, seconds: float) -> Present:
    present, lines = {0: me}, {}
    try:
        with _listen(int(cluster.coordinator.rpartition(":")[2])) as listener:
            while len(present) < cluster.processes and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    line = Line(listener.accept()[0])
                    line.socket.settimeout(10)
                    message = line.next()
                    process, host, _ = int(message["process"]), str(message["host"]), message["facts"]
                except (OSError, LookupError, TypeError, ValueError):  # nobody, or a stranger
                    continue
                if process == 0 or process in lines and not lines[process].is_closed():
                    line.send({"error": (error := f"{host} and {_name(process, present)} both say they are it")})
                    raise UserError(error)
                present[process], lines[process] = message, line
        _check(cluster, present, seconds)
    except UserError as error:
        for line in lines.values():
            line.send({"error": str(error)})
        raise
    hosts = [present[process]["host"] for process in range(cluster.processes)]
    mark = uuid.uuid4().hex
    for line in lines.values():
        line.send({"hosts": hosts, "mark": mark})
    return Present(hosts, mark, lines)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port}: {error.strerror}; choose another") from error


def _answer(cluster: Cluster, me: Message, deadline: float, seconds: float) -> Present:
    host, _, port = cluster.coordinator.rpartition(":")
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10)))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        line.send(me)
        line.socket.settimeout(left + 10)  # process 0 waits for as long, and may have begun later
        try:
            verdict = line.next()
        except OSError:
            reason = "it ended without an answer"
            line.close()
            time.sleep(0.2)
            continue
        if "hosts" not in verdict:
            raise UserError(str(verdict.get("error")))
        return Present(verdict["hosts"], verdict["mark"], {0: line})
    raise UserError(
        f"process 0 did not answer at {cluster.coordinator} within {seconds:g} s ({reason}): "
        "is it running, and is the port open?"
    )


def _check(cluster: Cluster, present: Mapping[int, Message], seconds: float) -> None:
    missing = [process for process in range(cluster.processes) if process not in present]
    if strangers := [process for process in present if process >= cluster.processes]:
        raise UserError(f"{_name(min(strangers), present)} is not one of {cluster.processes} processes")
    if missing:
        names = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"process {names} of {cluster.processes} did not come within {seconds:g} s "
            f"(here: {', '.join(_name(p, present) for p in sorted(present)[:20])})"
        )
    for key in sorted({key for message in present.values() for key in message["facts"]}):
        values = {process: str(message["facts"].get(key, "absent")) for process, message in present.items()}
        if odd := different(values):
            usual = next(value for process, value in values.items() if process not in odd)
            raise UserError(f"{_name(odd[0], present)} differs in {key}: {values[odd[0]]}, elsewhere {usual}")


def different(values: Mapping[int, str]) -> list[int]:
    """The processes whose value is not the usual one: the most common, of two equally common that of process 0."""
    counts = Counter(values[process] for process in sorted(values))
    usual = counts.most_common(1)[0][0]
    return sorted(process for process, value in values.items() if value != usual)


def _name(process: int, present: Mapping[int, Message]) -> str:
    return f"process {process} ({present[process]['host']})"
