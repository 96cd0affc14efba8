"""Thread and process replicas under the one contract, and what only a process does."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelserve.errors import LoadFailed, WorkerDied
from modelserve.execution import cores
from modelserve.execution.process import ProcessReplica, WorkerSpec
from modelserve.execution.thread import ThreadReplica
from modelserve.signature import Signature
from modelserve.testing.misbehaving import DEAF, PATH, SEGFAULT, Misbehaving
from modelserve.testing.replicas import NUMBER, Make, ReplicaContract, numbers, started


def thread_replica(model: str, signature: Signature, **options: Any) -> ThreadReplica:
    return ThreadReplica(lambda: Misbehaving().load(Path(), model, options), signature)


def process_replica(model: str, signature: Signature, *, niceness: int = 0, **options: Any) -> ProcessReplica:
    spec = WorkerSpec(
        framework=PATH,
        path="",
        format=model,
        load_options=options,
        signature=signature.to_json(),
        replicas=2,
        niceness=niceness,
    )
    return ProcessReplica(spec, signature)


class TestThreadReplica(ReplicaContract):
    """The contract, in a thread."""

    @pytest.fixture
    def make(self) -> Make:
        return thread_replica


class TestProcessReplica(ReplicaContract):
    """The contract, in a process."""

    @pytest.fixture
    def make(self) -> Make:
        return process_replica


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail the test when it leaves a process, a descriptor, a thread or shared memory behind."""
    before = _held()
    yield
    assert _held() == before


def _held() -> dict[str, Any]:
    memory = Path("/dev/shm")  # noqa: S108  # to see that nothing is put there
    descriptors = Path("/proc/self/fd")
    return {
        "children": _children(),
        "descriptors": len(list(descriptors.iterdir())) if descriptors.exists() else 0,
        "threads": sorted(each.name for each in threading.enumerate() if each.name.startswith("modelserve")),
        "shared memory": sorted(each.name for each in memory.iterdir()) if memory.exists() else [],
    }


def _children() -> set[int]:
    listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return {pid for pid, parent in pairs if parent == os.getpid()} - {max(pid for pid, _ in pairs)}


def test_nothing_is_left_of_a_replica_however_it_ends(nothing_left: None) -> None:
    """After a stop, a kill, a crash and a failed start there is no process, descriptor, thread or shared memory."""

    async def scenario() -> None:
        async with started(process_replica("double", NUMBER)) as replica:
            await replica.infer(numbers(*range(10_000)))
        killed = process_replica("double", NUMBER)
        await killed.start()
        killed.kill("a test says so")
        await killed.ended()
        crashed = process_replica("touchy", NUMBER)
        await crashed.start()
        with pytest.raises(WorkerDied):
            await crashed.infer(numbers(SEGFAULT))
        assert "SIGSEGV" in await crashed.ended()
        failed = process_replica("double", NUMBER, first="die")
        with pytest.raises(LoadFailed, match="before it had loaded"):
            await failed.start()
        assert "exit status 3" in await failed.ended()

    asyncio.run(scenario())
    for each in threading.enumerate():
        if each.name.startswith("modelserve"):
            each.join(10)


async def test_a_start_that_is_cancelled_leaves_nothing(nothing_left: None) -> None:
    """A worker that hangs while it loads is killed when nobody waits for it any more."""
    replica = process_replica("double", NUMBER, first="hang")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(replica.start(), 0.5)
    await replica.stop()
    assert "SIGKILL" in await replica.ended()
    for each in threading.enumerate():
        if each.name.startswith("modelserve"):
            await asyncio.to_thread(each.join, 10)
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_worker_imports_its_adapter_and_little_else() -> None:
    """No SQL, no settings, no web and no routing in a worker: they cost memory and start-up time in every replica."""
    async with started(process_replica("imported", NUMBER)) as replica:
        (imported,) = await replica.infer(numbers(1))
    packages = {name.partition(".")[0] for name in imported.split()}
    assert packages.isdisjoint({"sqlalchemy", "alembic", "pydantic", "fsspec", "sklearn", "pandas"})
    modules = {name for name in imported.split() if name.startswith("modelserve.")}
    assert not {name for name in modules if name.split(".")[1] in {"registry", "server", "live", "http", "config"}}


async def test_a_worker_has_limits_a_priority_and_the_hosts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are bounded by replicas, the niceness is applied, and modules are found where the host finds them."""
    monkeypatch.setattr(cores, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.syspath_prepend("/somewhere/special")
    environment = dict(os.environ)
    async with started(process_replica("environment", NUMBER, niceness=5)) as replica:
        (told,) = await replica.infer(numbers(1))
    assert told["niceness"] == os.nice(0) + 5
    assert told["threads"] == "3"
    assert "/somewhere/special" in told["path"]
    assert dict(os.environ) == environment


async def test_signals_for_the_host_leave_a_worker_alone() -> None:
    """Ctrl-C and SIGTERM reach the whole group of processes; the host may still need its workers to finish."""
    async with started(process_replica("double", NUMBER)) as replica:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(replica.detail()["pid"], number)
        assert await replica.infer(numbers(1)) == [2.0]


async def test_a_worker_that_closes_its_socket_is_ended() -> None:
    """A process that lives on without a connection is of no use, and is killed."""
    replica = process_replica("touchy", NUMBER)
    await replica.start()
    with pytest.raises(WorkerDied):
        await replica.infer(numbers(DEAF))
    assert "SIGKILL" in await replica.ended()


async def test_running_workers_changes_nothing_global() -> None:
    """Signal handlers, start method, limits and the environment are the host's own."""

    def state() -> Any:
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        return handlers, multiprocessing.get_start_method(allow_none=True), limits, dict(os.environ), list(sys.path)

    before = state()
    async with started(process_replica("double", NUMBER)) as replica:
        await replica.infer(numbers(1))
        assert state() == before
    assert state() == before


async def test_an_interpreter_that_does_not_start_is_a_load_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose ``sys.executable`` is no Python gets one clear error."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(LoadFailed, match="could not be started"):
        await process_replica("double", NUMBER).start()
