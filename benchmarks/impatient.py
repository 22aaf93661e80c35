"""Clients that arrive at a given rate and give up after a second. An open loop that needs little CPU time.

    python -m benchmarks.impatient --phases 100:5,2000:20,100:10 --job embed

A phase is `requests a second:seconds`. Each request is one client: it waits for its answer for `--patience-s`, counted
from the moment it was due, then closes its connection. Prints one line of JSON: what became of the requests that were
due in each second, and percentiles of each phase.

The generator shares its cores with the server, and at ten times the server's rate its own CPU time matters. This one
is a loop over epoll that reads no more of an answer than its status and length: about 20 us for a request, where
benchmarks.load needs 70.
"""

import argparse
import json
import random
import resource
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.figures import percentiles_ms
from benchmarks.load import arrivals
from benchmarks.workload import JOBS, request_maker, seed_of

_LONGEST_WAIT_S = 0.05  # of one call of epoll, so that clients give up in time
_MOST_AT_ONCE = 64  # requests that are sent before answers are read, so that a late generator does not stop reading


@dataclass(frozen=True)
class Phase:
    """`rate` requests a second for `seconds`."""

    rate: float
    seconds: float


@dataclass
class Fates:
    """What became of the requests of one phase or one second.

    `good` were answered with 2xx in time, `refused` with 429. `errors` counts other statuses, lost connections, and
    requests that this process could not send in time (`unsent`). `gave_up` counts clients whose patience ended.
    Latencies count from the moment a request was due, in seconds.
    """

    offered: int = 0
    gave_up: int = 0
    good_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str, latency_s: float, patience_s: float) -> None:
        """Count one request. `outcome` is a status, `gave up` or `lost`. An answer after the patience ended is late."""
        self.offered += 1
        if outcome.startswith("2") and latency_s <= patience_s:
            self.good_s.append(latency_s)
        elif outcome == "429":
            self.refused_s.append(latency_s)
        elif outcome.startswith("2") or outcome == "gave up":
            self.gave_up += 1
        else:
            self.errors[outcome] = self.errors.get(outcome, 0) + 1


class Answer:
    """Recognises the end of one answer in the bytes of a connection."""

    def __init__(self) -> None:
        self._read = b""
        self._left: int | None = None
        self.status = ""
        self.keeps_alive = True

    def feed(self, data: bytes) -> bool:
        """Take the next bytes. Returns whether the answer is complete.

        Raises:
            ValueError: the bytes are not an HTTP answer with a content-length.
        """
        if self._left is None:
            self._read += data
            end = self._read.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = self._read[:end].lower() + b"\r\n"
            at = head.index(b"\r\ncontent-length:") + 17
            self.status = head[9:12].decode()
            self.keeps_alive = b"\r\nconnection: close\r\n" not in head
            self._left = int(head[at : head.index(b"\r\n", at)]) - (len(self._read) - end - 4)
        else:
            self._left -= len(data)
        return self._left <= 0


class _Client:
    """One request on one connection."""

    __slots__ = ("answer", "due", "number", "socket", "unsent")

    def __init__(self, connection: socket.socket, number: int, due: float, request: bytes) -> None:
        self.socket = connection
        self.number = number
        self.due = due
        self.unsent = request
        self.answer = Answer()


class Clients:
    """All clients of one server. `run` returns the outcome and the latency of each request, in order."""

    def __init__(self, url: str, patience_s: float) -> None:
        there = urlsplit(url)
        self._address = (there.hostname or "", there.port or 80)
        self._patience_s = patience_s
        self._epoll = select.epoll()
        self._idle: list[socket.socket] = []
        self._waiting: dict[int, _Client] = {}
        self._due: deque[_Client] = deque()  # in the order in which their patience ends
        self.outcomes: list[tuple[str, float]] = []
        self.late_s: list[float] = []

    def run(self, moments: np.ndarray, requests: list[bytes]) -> None:
        """Send each request at its moment, in seconds from now, and wait until every client has an outcome."""
        self.outcomes = [("", 0.0)] * len(requests)
        started = time.perf_counter()
        due = [started + float(moment) for moment in moments]
        sent = 0
        while sent < len(due) or self._waiting:
            now = time.perf_counter()
            for number in range(sent, min(sent + _MOST_AT_ONCE, len(due))):
                if due[number] > now:
                    break
                self.late_s.append(now - due[number])
                if now - due[number] < self._patience_s:
                    self._send(number, due[number], requests[number])
                else:
                    self.outcomes[number] = ("unsent", self._patience_s)
                sent += 1
            self._give_up(now)
            wait_s = min(_LONGEST_WAIT_S, max(0.0, due[sent] - now)) if sent < len(due) else _LONGEST_WAIT_S
            for descriptor, event in self._epoll.poll(wait_s, 256):
                self._on_event(descriptor, event)

    def _send(self, number: int, due: float, request: bytes) -> None:
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = socket.socket()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.connect_ex(self._address)
            self._epoll.register(connection, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        client = _Client(connection, number, due, request)
        self._waiting[connection.fileno()] = client
        self._due.append(client)
        self._write(client)

    def _write(self, client: _Client) -> None:
        try:
            client.unsent = client.unsent[client.socket.send(client.unsent) :]
        except BlockingIOError:
            return  # not connected yet, or the buffer is full: EPOLLOUT follows
        except OSError:
            self._finish(client, "lost", keep=False)

    def _on_event(self, descriptor: int, event: int) -> None:
        client = self._waiting.get(descriptor)
        if client is None:  # the server closed an idle connection, or its client gave up in this turn
            if event & ~select.EPOLLOUT:
                self._forget_idle(descriptor)
        elif client.unsent:
            self._write(client)
        elif event & ~select.EPOLLOUT:
            self._read(client)

    def _read(self, client: _Client) -> None:
        complete = False
        try:
            while not complete:
                data = client.socket.recv(1 << 18)
                if not data:
                    raise ConnectionResetError
                complete = client.answer.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self._finish(client, "lost", keep=False)
        else:
            self._finish(client, client.answer.status, keep=client.answer.keeps_alive)

    def _finish(self, client: _Client, outcome: str, *, keep: bool) -> None:
        del self._waiting[client.socket.fileno()]
        self.outcomes[client.number] = (outcome, time.perf_counter() - client.due)
        if keep:
            self._idle.append(client.socket)
        else:
            self._close(client.socket)

    def _give_up(self, now: float) -> None:
        while self._due and (self.outcomes[self._due[0].number][0] or self._due[0].due + self._patience_s <= now):
            client = self._due.popleft()
            if not self.outcomes[client.number][0]:
                self._finish(client, "gave up", keep=False)

    def _forget_idle(self, descriptor: int) -> None:
        for connection in self._idle:
            if connection.fileno() == descriptor:
                self._idle.remove(connection)
                self._close(connection)
                return

    def _close(self, connection: socket.socket) -> None:
        self._epoll.unregister(connection)
        connection.close()

    def close(self) -> None:
        """Close all connections."""
        for connection in [*self._idle, *(client.socket for client in self._waiting.values())]:
            connection.close()
        self._epoll.close()


def parse_phases(text: str) -> list[Phase]:
    """`100:5,2000:20` as phases. Raises ValueError if it is something else."""
    pairs = (part.split(":") for part in text.split(","))
    return [Phase(float(rate), float(seconds)) for rate, seconds in pairs]


def moments_of(phases: list[Phase], seed: int) -> tuple[np.ndarray, list[int]]:
    """The moments at which requests are due, in seconds from the start, and the phase of each."""
    start, parts, numbers = 0.0, [], []
    for number, phase in enumerate(phases):
        part = arrivals(phase.rate, phase.seconds, seed_of(seed, number)) + start
        parts.append(part)
        numbers += [number] * len(part)
        start += phase.seconds
    return np.concatenate(parts), numbers


def of_seconds(
    moments: np.ndarray, outcomes: list[tuple[str, float]], duration_s: float, patience_s: float
) -> list[dict[str, Any]]:
    """What became of the requests that were due in each second."""
    seconds = [Fates() for _ in range(int(np.ceil(duration_s)))]
    for moment, (outcome, latency_s) in zip(moments, outcomes, strict=True):
        seconds[int(moment)].add(outcome, latency_s, patience_s)
    return [summary(fates, 1.0) for fates in seconds]


def summary(fates: Fates, seconds: float) -> dict[str, Any]:
    """Rates a second, counts, and percentiles in milliseconds."""
    return {
        "offered_per_s": fates.offered / seconds,
        "good_per_s": len(fates.good_s) / seconds,
        "refused": len(fates.refused_s),
        "gave_up": fates.gave_up,
        "errors": fates.errors,
        "latency": percentiles_ms(fates.good_s) if fates.good_s else None,
        "refused_latency": percentiles_ms(fates.refused_s) if fates.refused_s else None,
    }


def run(url: str, phases: list[Phase], *, job: str, length: str, patience_s: float, seed: int) -> dict[str, Any]:
    """Run all phases one after the other. Returns the result as it is printed."""
    moments, numbers = moments_of(phases, seed)
    make = request_maker(job, 1, length, random.Random(seed))
    host = urlsplit(url).netloc
    requests = []
    for request in (make() for _ in moments):
        head = f"POST {request.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: "
        requests.append(f"{head}{len(request.body)}\r\n\r\n".encode() + request.body)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each client that waits
    clients = Clients(url, patience_s)
    used, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    clients.run(moments, requests)
    now, took_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    clients.close()
    fates = [Fates() for _ in phases]
    for number, (outcome, latency_s) in zip(numbers, clients.outcomes, strict=True):
        fates[number].add(outcome, latency_s, patience_s)
    return {
        "phases": [summary(found, phase.seconds) for found, phase in zip(fates, phases, strict=True)],
        "seconds": of_seconds(moments, clients.outcomes, sum(phase.seconds for phase in phases), patience_s),
        "late_p99_ms": percentiles_ms(clients.late_s)["p99_ms"],
        "cpu_share": (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / took_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--phases", type=parse_phases, required=True, help="rate:seconds, separated by commas")
    parser.add_argument("--job", choices=JOBS, default="embed")
    parser.add_argument("--length", default="short", help="short, medium, mixed, or a number of words")
    parser.add_argument("--patience-s", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    options = vars(parser.parse_args())
    print(json.dumps(run(options.pop("url"), options.pop("phases"), **options)))


if __name__ == "__main__":
    main()
