"""Thread and process replicas under the one contract, and what only a process does."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from modelserve.errors import ExecutionError, InferenceFailed, LoadFailed, WorkerDied
from modelserve.execution import process
from modelserve.execution.arena import Arena
from modelserve.execution.process import ProcessReplica
from modelserve.testing.misbehaving import DEAF, KILLED, SEGFAULT
from modelserve.testing.replicas import GATED, IMAGE, NUMBER, Make, ReplicaContract, exists, numbers, started
from tests.execution.faulty import FAULT, FINE, FaultyFramework
from tests.execution.hosting import process_replica, thread_replica


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


async def test_a_start_that_is_cancelled_leaves_nothing(nothing_left: None) -> None:
    """A worker that hangs while it loads is killed when nobody waits for it any more."""
    replica = process_replica("double", NUMBER, first="hang")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(replica.start(), 0.5)
    await replica.stop()
    assert "SIGKILL" in await replica.ended()


async def test_a_worker_imports_its_adapter_and_little_else() -> None:
    """No SQL, no settings, no web and no routing in a worker: they cost memory and start-up time in every replica."""
    async with started(process_replica("imported", NUMBER)) as replica:
        (imported,) = await replica.infer(numbers(1))
    packages = {name.partition(".")[0] for name in imported.split()}
    assert packages.isdisjoint({"sqlalchemy", "alembic", "pydantic", "fsspec", "sklearn", "pandas"})
    modules = {name for name in imported.split() if name.startswith("modelserve.")}
    assert not {name for name in modules if name.split(".")[1] in {"registry", "server", "live", "http", "config"}}


async def test_a_worker_has_limits_a_priority_and_the_hosts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are bounded, the niceness is applied, and modules are found where the host finds them."""
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


# -- of both kinds, beyond the contract --------------------------------------------------------------------


@pytest.fixture(params=[thread_replica, process_replica], ids=["thread", "process"])
def make(request: pytest.FixtureRequest) -> Make:
    """Return how a replica of either kind is made."""
    made: Make = request.param
    return made


@pytest.mark.promise("P2")
async def test_answers_are_the_bare_models_bit_by_bit(make: Make) -> None:
    """Negative zero, the smallest float, the infinities and NaN come back with the very bits they had."""
    bare = FaultyFramework().load(Path(), "special", {}).infer({"x": np.array([FAULT])})["output"][0]
    async with started(make("special", NUMBER)) as replica:
        answers = await replica.infer(numbers(*[FAULT] * 3))
    assert [struct.pack("7d", *answer) for answer in answers] == [bare.tobytes()] * 3


@pytest.mark.promise("P2")
async def test_a_model_that_answers_its_own_large_input(make: Make) -> None:
    """What a model answers may lie where its input lies; the batch behind it does not overwrite it."""
    async with started(make("echo", IMAGE)) as replica:
        for first in range(0, 6, 2):
            at_hand = (first, first + 1)
            running = [replica.infer([(np.full((3, 64, 64), i, dtype=np.float32),)] * 2) for i in at_hand]
            for i, each in zip(at_hand, running, strict=True):
                answers = np.array([answer["x"] for answer in await each])
                assert answers.shape == (2, 3, 64, 64)
                assert np.all(answers == i)


async def test_values_without_a_json_form_are_refused_by_a_worker() -> None:
    """A worker writes answers down as JSON, so it refuses a set, and lives on."""
    async with started(process_replica("sets", NUMBER)) as replica:
        for _ in range(2):
            with pytest.raises(InferenceFailed, match="no JSON form"):
                await replica.infer(numbers(1))
        assert replica.alive


async def test_nothing_is_left_of_a_thread(nothing_left: None) -> None:
    """After a stop, a kill and a failed start there is no thread of a replica."""
    async with started(thread_replica("double", NUMBER)) as replica:
        await replica.infer(numbers(1))
    killed = thread_replica("double", NUMBER)
    await killed.start()
    killed.kill("a test says so")
    failed = thread_replica("double", NUMBER, first="fail")
    with pytest.raises(LoadFailed):
        await failed.start()
    await failed.stop()


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (thread_replica, "too large"),
        (process_replica, "too large"),
        (thread_replica, "no words"),
        (process_replica, "no words"),
    ],
)
async def test_a_batch_whose_answer_cannot_be_given_fails_alone(kind: Make, model: str) -> None:
    """An answer that cannot be written down, or an error without words, is the model's failure and no more."""
    async with started(kind(model, NUMBER)) as replica:
        with pytest.raises(InferenceFailed):
            await replica.infer(numbers(FAULT))
        assert replica.alive
        assert await replica.infer(numbers(FINE)) == [0.0]


# -- of a process, when host and worker are in a tight spot -----------------------------------------------


def _wait_for_the_death_of(replica: ProcessReplica) -> None:
    """Hold the event loop until the worker is gone and its end was noticed, as a busy host might."""
    (watcher,) = [each for each in threading.enumerate() if each.name == replica._name + "-wait"]
    watcher.join(30)


@pytest.mark.promise("P2")
async def test_an_answer_sent_before_a_death_is_not_lost() -> None:
    """The host was busy: the first batch was answered, the second killed the worker, and each is told so."""
    replica = process_replica("touchy", NUMBER)
    await replica.start()
    answered, fatal = replica.infer(numbers(1)), replica.infer(numbers(KILLED))
    _wait_for_the_death_of(replica)
    await asyncio.wait([answered, fatal])
    await replica.stop()
    assert isinstance(fatal.exception(), WorkerDied)
    assert await answered == [2.0]


@pytest.mark.promise("P1")
async def test_an_answer_sent_before_a_stop_is_not_lost(tmp_path: Path) -> None:
    """The host was busy while a worker finished its batch and ended: the answer is there all the same."""
    replica = process_replica("gated", GATED)
    await replica.start()
    running = replica.infer([(1.0, str(tmp_path / "gate"), str(tmp_path / "started"))])
    await exists(tmp_path / "started")
    stopping = asyncio.create_task(replica.stop())
    await asyncio.sleep(0)
    (tmp_path / "gate").touch()
    _wait_for_the_death_of(replica)
    await asyncio.wait([running])
    await stopping
    assert await running == [2.0]


async def test_a_batch_that_cannot_be_handed_over_fails_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without memory for an arena fails the batch; the replica is whole afterwards, or says that it is not."""
    row = (np.ones((3, 64, 64), dtype=np.float32),)

    def no_memory(self: Arena, size: int) -> memoryview:
        raise OSError(errno.ENOMEM, f"no {size} bytes")

    async with started(process_replica("double", IMAGE)) as replica:
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "block", no_memory)
            failing = replica.infer([row])
        with pytest.raises(ExecutionError):
            await failing
        if replica.alive:
            assert np.all(np.array(await replica.infer([row])) == 2)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket | Arena]]:
    """Collect the sockets and arenas that a replica opens; close in the end what it has not."""
    collected: list[socket.socket | Arena] = []
    create, socketpair = Arena.create, socket.socketpair

    def collecting_arena() -> Arena:
        collected.append(create())
        return collected[-1]  # type: ignore[return-value]

    def collecting_pair() -> tuple[socket.socket, socket.socket]:
        pair = socketpair()
        collected.extend(pair)
        return pair

    monkeypatch.setattr(Arena, "create", collecting_arena)
    monkeypatch.setattr(process, "socket", SimpleNamespace(socketpair=collecting_pair))
    yield collected
    for each in collected:
        each.close()


def _is_open(each: socket.socket | Arena) -> bool:
    return (each.fd if isinstance(each, Arena) else each.fileno()) >= 0


@pytest.mark.promise("P7")
async def test_a_start_without_descriptors_leaves_none(
    opened: list[socket.socket | Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that runs out of descriptors half-way is a ``LoadFailed`` and gives back those it had."""
    create = Arena.create

    def few() -> Arena:
        if sum(isinstance(each, Arena) for each in opened) == 2:
            raise OSError(errno.EMFILE, "too many open files")
        return create()

    monkeypatch.setattr(Arena, "create", few)
    replica = process_replica("double", NUMBER)
    with pytest.raises(LoadFailed, match="too many open files"):
        await replica.start()
    await replica.stop()
    assert len(opened) == 4
    assert not any(map(_is_open, opened))


@pytest.mark.promise("P7")
async def test_a_start_without_a_thread_leaves_nothing(
    opened: list[socket.socket | Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that gets no thread to wait in is a ``LoadFailed``, and the replica comes to its end."""

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    replica = process_replica("double", NUMBER)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(LoadFailed):
                await replica.start()
        await asyncio.wait_for(replica.ended(), 10)
        assert not any(map(_is_open, opened))
    finally:
        if replica._process is not None:  # a process that nobody waited for would trouble the tests after this one
            replica._process.wait()
