"""A closed-loop HTTP load generator that is light enough to be no part of the figure.

One thread and one selector over plain sockets: ready-made request bytes go out, and of an answer only the status and
the content length are read. It runs in a process of its own, see :func:`generator`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Final

_DRAIN_S: Final = 5.0  # how long answers are waited for after the last request
_BUFFER: Final = 65_536


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """So many connections, each sending its next request when it has its answer, for ``seconds``.

    ``keep_every`` is which share of the answers is kept for looking at: every one (1), every 100th, none (0).
    """

    port: int
    requests: Sequence[bytes]
    connections: int
    seconds: float
    keep_every: int = 0


@dataclasses.dataclass(slots=True)
class Outcome:
    """What came of it. Times are ``time.perf_counter()``, which all processes of a machine share.

    ``finished`` and ``latencies`` (seconds) hold one value per answer of status 200; ``refusals`` one
    time, latency and body per answer of another status; ``kept`` pairs the index of a request with the body of its
    answer; ``starved`` counts the connections without a single answer before the end;
    ``busy`` is the generator's own share of a processor: close to 1, it was the generator that was measured.
    """

    started: float = 0.0
    ended: float = 0.0
    finished: list[float] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)
    failures: Counter[str] = dataclasses.field(default_factory=Counter)
    refusals: list[tuple[float, float, bytes]] = dataclasses.field(default_factory=list)
    kept: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    starved: int = 0
    busy: float = 0.0

    @property
    def rate(self) -> float:
        """Good answers per second, not counting those that came after the end."""
        return sum(at <= self.ended for at in self.finished) / (self.ended - self.started)

    def tell_failures(self, name: str) -> None:
        """Print what failed and how the first refusal reads; nothing when nothing failed."""
        if self.failures:
            counts = ", ".join(f"{count} × {kind}" for kind, count in self.failures.items())
            print(f"{name}: {counts}; longest wait of the others {max(self.latencies, default=0):.2f} s")
        for at, latency, body in self.refusals[:1]:
            print(f"  first after {at - self.started:.2f} s, having waited {latency:.2f} s: {body.decode()}")


def post(path: str, body: bytes) -> bytes:
    """Return the bytes of one request."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@contextlib.contextmanager
def generator() -> Iterator[ProcessPoolExecutor]:
    """Start the process that :func:`run` is submitted to."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield process


def run(load: Load) -> Outcome:
    """Send the load and return what came of it."""
    generator = _Generator(load)
    try:
        return generator.run()
    finally:
        generator.close()


class _Connection:
    """One socket and the request that is under way on it."""

    __slots__ = ("answers", "index", "rest", "sent", "sock")

    def __init__(self, port: int, index: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=_DRAIN_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.index = index
        self.sent = 0.0
        self.rest = b""
        self.answers = 0


class _Generator:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._outcome = Outcome()
        self._selector = selectors.DefaultSelector()
        # Far apart in the list of requests, so that no two connections send the same ones side by side.
        step = max(1, len(load.requests) // load.connections)
        self._connections = [_Connection(load.port, i * step) for i in range(load.connections)]

    def run(self) -> Outcome:
        outcome = self._outcome
        outcome.started = time.perf_counter()
        outcome.ended = outcome.started + self._load.seconds
        worked = time.process_time()
        for connection in self._connections:
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)
            self._send(connection)
        self._serve_until(outcome.ended)
        outcome.starved = sum(connection.answers == 0 for connection in self._connections)
        outcome.busy = (time.process_time() - worked) / (time.perf_counter() - outcome.started)
        self._serve_until(outcome.ended + _DRAIN_S)
        outcome.failures["no answer"] += len(self._selector.get_map())
        outcome.failures += Counter()  # drops the zeros
        return outcome

    def close(self) -> None:
        self._selector.close()
        for connection in self._connections:
            connection.sock.close()

    def _serve_until(self, end: float) -> None:
        """Read answers until then, or until no connection waits for one."""
        while (left := end - time.perf_counter()) > 0 and self._selector.get_map():
            for key, _ in self._selector.select(left):
                self._receive(key.data)

    def _send(self, connection: _Connection) -> None:
        requests = self._load.requests
        connection.index = (connection.index + 1) % len(requests)
        connection.sent = time.perf_counter()
        connection.sock.sendall(requests[connection.index])

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(_BUFFER)
        except OSError:
            data = b""
        now = time.perf_counter()
        if not data:
            self._lost(connection)
            return
        answer = connection.rest + data
        body = _body_at(answer)
        if body is None:
            connection.rest = answer
            return
        connection.rest = b""
        self._record(connection, answer, body, now)
        if now < self._outcome.ended:
            self._send(connection)
        else:
            self._selector.unregister(connection.sock)

    def _record(self, connection: _Connection, answer: bytes, body: int, now: float) -> None:
        outcome, keep_every = self._outcome, self._load.keep_every
        connection.answers += 1
        if answer[9:12] != b"200":
            outcome.failures[f"HTTP {answer[9:12].decode()}"] += 1
            outcome.refusals.append((now, now - connection.sent, answer[body:]))
            return
        outcome.finished.append(now)
        outcome.latencies.append(now - connection.sent)
        if keep_every and len(outcome.finished) % keep_every == 0:
            outcome.kept.append((connection.index, answer[body:]))

    def _lost(self, connection: _Connection) -> None:
        self._outcome.failures["connection lost"] += 1
        self._selector.unregister(connection.sock)


def _body_at(answer: bytes) -> int | None:
    """Return where the body of a complete answer begins; None while some of it is missing.

    Takes header names in lower case, as uvicorn and its applications write them.
    """
    head_end = answer.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    start = answer.find(b"content-length: ") + 16
    length = int(answer[start : answer.find(b"\r", start)])
    return head_end + 4 if len(answer) >= head_end + 4 + length else None
