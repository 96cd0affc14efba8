"""Several host processes on one registry, requests to all of them, and a judge over every answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import modelserve as ms
from modelserve.testing.models import tells, telltale
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
MODEL = "telltale"
LIMIT_S = 50.0
_CONNECTIONS = 4  # to each host


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A process that serves the registry on a port."""

    port: int
    pid: int

    @property
    def generation(self) -> dict[str, int]:
        """What it says is wanted, and what it has applied."""
        shown: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/models/{MODEL}", timeout=20).json()
        return dict(shown["generation"])

    @property
    def resident_bytes(self) -> int:
        fields = Path(f"/proc/{self.pid}/statm").read_text(encoding="utf-8").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A version was put into production at some moment between two times."""

    version: int
    begun: float
    ended: float


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One request: what was sent and when, what came back and when; ``body`` is None where nothing came."""

    x: float
    sent: float
    received: float
    status: int
    body: Mapping[str, Any] | None


def register(registry: ms.Registry, versions: int = 3) -> None:
    """Register telltale versions from 1 on, the first of them in production."""
    for version in range(1, versions + 1):
        registry.register(MODEL, str(version), telltale(version), example=np.array([[0.0], [1.0]]))
    registry.promote(MODEL, "1")


@contextlib.contextmanager
def fleet(size: int, folder: Path, **settings: Any) -> Iterator[list[Host]]:
    """Run so many hosts with these settings until each is ready."""
    settings |= {"cache_dir": str(folder / "cache"), "models": {MODEL: {"timeout_ms": 10_000}}}
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(_host(folder, settings)) for _ in range(size)]
        for host in hosts:
            _wait_until_ready(host)
        yield hosts


@contextlib.contextmanager
def _host(folder: Path, settings: Mapping[str, Any]) -> Iterator[Host]:
    port = free_port()
    command = [sys.executable, "-m", "tests.hosts.fleet_host", str(port), json.dumps(settings)]
    log = (folder / f"host-{port}.log").open("wb")
    with log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        try:
            yield Host(port, process.pid)
        finally:
            process.terminate()
            process.wait(LIMIT_S)


def _wait_until_ready(host: Host) -> None:
    give_up = time.monotonic() + LIMIT_S
    while time.monotonic() < give_up:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{host.port}/health/ready", timeout=20).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("a host did not become ready")


def converged(registry: ms.Registry, hosts: Sequence[Host]) -> float:
    """Wait until every host has applied the registry's generation; return the seconds that took."""
    began = time.monotonic()
    wanted = registry.generations()[MODEL]
    while any(host.generation != {"wanted": wanted, "applied": wanted} for host in hosts):
        assert time.monotonic() - began < LIMIT_S, [host.generation for host in hosts]
    return time.monotonic() - began


# -- changes and requests ----------------------------------------------------------------------------------


def change_at_random(registry: ms.Registry, count: int, every_s: float, dice: random.Random) -> list[Change]:
    """Promote versions 1 to 3 and roll back, at random and at random times, ``every_s`` apart on average.

    What was in production before is the first of the changes returned.
    """
    changes = [Change(int(registry.production(MODEL).version), 0.0, 0.0)]
    for _ in range(count):
        time.sleep(dice.uniform(0, 2 * every_s))
        begun = time.perf_counter()
        try:
            done = registry.rollback(MODEL) if dice.random() < 0.4 else registry.promote(MODEL, str(dice.randint(1, 3)))
        except ms.InvalidTransition:  # nothing earlier to go back to
            done = registry.promote(MODEL, str(dice.randint(1, 3)))
        changes.append(Change(int(done.version), begun, time.perf_counter()))
    return changes


@contextlib.contextmanager
def requests(hosts: Sequence[Host], per_second: float) -> Iterator[list[Answer]]:
    """Send requests to the hosts in turn while the block runs; the list is complete after it."""
    answers: list[Answer] = []
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as executor:
        sending = executor.submit(loop.run_until_complete, _send_until(stop, hosts, per_second, answers))
        try:
            yield answers
        finally:
            loop.call_soon_threadsafe(stop.set)
            sending.result(LIMIT_S)
            loop.close()


async def _send_until(stop: asyncio.Event, hosts: Sequence[Host], per_second: float, answers: list[Answer]) -> None:
    interval = len(hosts) * _CONNECTIONS / per_second
    ports = [host.port for host in hosts] * _CONNECTIONS
    offsets = [interval * i / len(ports) for i in range(len(ports))]
    await asyncio.gather(
        *(_converse(stop, port, offset, interval, answers) for port, offset in zip(ports, offsets, strict=True))
    )


async def _converse(stop: asyncio.Event, port: int, offset: float, interval: float, answers: list[Answer]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    due = time.perf_counter() + offset
    try:
        while not stop.is_set():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += interval
            answers.append(await _ask(reader, writer, round(random.uniform(-100, 100), 3)))
            if answers[-1].body is None:
                return
    finally:
        writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, x: float) -> Answer:
    body = json.dumps({"inputs": {"x": [x]}}).encode()
    head = f"POST /predict/{MODEL} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    sent = time.perf_counter()
    try:
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length: ")[2].partition(b"\r")[0])
        received = json.loads(await reader.readexactly(length))
    except (OSError, asyncio.IncompleteReadError):
        return Answer(x, sent, time.perf_counter(), 0, None)
    return Answer(x, sent, time.perf_counter(), int(answer[9:12]), received)


# -- judging -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How many requests there were, and what was wrong with them."""

    answers: int
    failed: int
    wrong: int
    not_allowed: int


def judge(answers: Sequence[Answer], changes: Sequence[Change], margin_s: float) -> Verdict:
    """Say whether each answer is what the version it names gives, and whether that version was allowed.

    It was when it was in production at some moment between request and answer, or had been until ``margin_s`` before:
    a host learns of a change that much later at most.
    """
    good = [answer for answer in answers if answer.status == 200 and answer.body is not None]
    return Verdict(
        answers=len(answers),
        failed=len(answers) - len(good),
        wrong=sum(_is_wrong(answer) for answer in good),
        not_allowed=sum(not allowed(answer, changes, margin_s) for answer in good),
    )


def _is_wrong(answer: Answer) -> bool:
    assert answer.body is not None
    try:
        return tells(answer.body["prediction"], answer.x) != int(answer.body["model_version"])
    except AssertionError:
        return True


def allowed(answer: Answer, changes: Sequence[Change], margin_s: float) -> bool:
    """Whether the version that answered was in production while the request lived, or at most ``margin_s`` before."""
    assert answer.body is not None
    version = int(answer.body["model_version"])
    ends = [*(change.ended for change in changes[1:]), float("inf")]
    return any(
        change.version == version and change.begun <= answer.received and answer.sent <= end + margin_s
        for change, end in zip(changes, ends, strict=True)
    )
