"""Pools of worker processes while something goes wrong and 64 callers go on; each call ends right or typed, in time."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from modelserve.errors import DeadlineExceeded, InferenceFailed, NotReady, OutOfMemory, Overloaded, WorkerDied
from modelserve.events import CircuitOpened, Event, WorkerLost
from modelserve.execution import restarts as circuit
from modelserve.execution.pool import Pool, PoolOptions
from modelserve.execution.process import ProcessReplica, WorkerSpec
from modelserve.execution.supervisor import Infer
from modelserve.testing.misbehaving import (
    DEAF,
    EXIT,
    GARBAGE,
    GONE,
    KILLED,
    LIE,
    LOOP,
    MEMORY,
    RAISE,
    SEGFAULT,
    STUCK,
)
from modelserve.testing.replicas import NUMBER, numbers
from tests.execution.faulty import PATH

PATIENT_S, IMPATIENT_S = 20.0, 1.0
AFTER_S = 10.0
"""How late an answer may be: what a machine that has halted takes on its way back, and no caller that was forgotten."""
CALLERS = 64
TYPED = (WorkerDied, InferenceFailed, DeadlineExceeded, Overloaded, NotReady)
pytestmark = [pytest.mark.promise("P1"), pytest.mark.promise("P2"), pytest.mark.promise("P7")]


async def prove(infer: Infer) -> None:
    """Warm up, so that the cost of batches is known."""
    for size in (1, 2, 4, 8, 16, 32, 64):
        assert await infer(numbers(*range(size))) == [2.0 * i for i in range(size)]


@dataclasses.dataclass
class Crowd:
    """Callers of a pool, and the ledger of what they sent and got."""

    pool: Pool
    timeout_s: float = PATIENT_S
    answered: int = 0
    errors: Counter[str] = dataclasses.field(default_factory=Counter)

    async def ask(self, value: float) -> Exception | None:
        """Send one row; check that what comes back is right or typed, and in time."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        error = await self._outcome(value, began + self.timeout_s)
        assert loop.time() - began < self.timeout_s + AFTER_S
        if error is None:
            self.answered += 1
        else:
            assert isinstance(error, TYPED), repr(error)
            self.errors[type(error).__name__] += 1
        return error

    async def _outcome(self, value: float, deadline: float) -> Exception | None:
        try:
            (answer,) = await self.pool.submit(numbers(value), deadline)
        except TYPED as error:
            return error
        if isinstance(answer, Exception):
            return answer
        assert answer == 2 * value
        return None

    async def keep_asking(self, value: float, until: asyncio.Event) -> None:
        while not until.is_set():
            if await self.ask(value) is not None:
                await asyncio.sleep(0.01)  # a caller that was told to come back does not come back at once

    async def during(self, strike: Callable[[], Any]) -> Any:
        """Have all callers ask while ``strike`` runs and until the pool is whole again."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as callers:
            for number in range(CALLERS):
                callers.create_task(self.keep_asking(float(number), over))
            await until(lambda: self.answered > CALLERS)
            struck = await strike()
            await until(lambda: self.whole)
            seen = self.answered
            await until(lambda: self.answered > seen + 10 * CALLERS)
            over.set()
        return struck

    @property
    def whole(self) -> bool:
        return all(replica.state == "ready" for replica in self.pool.status().replicas)


@dataclasses.dataclass
class World:
    """A pool of worker processes, and what it told."""

    pool: Pool
    told: list[Event]
    load_options: dict[str, Any]

    def lost(self) -> list[str]:
        return [event.reason for event in self.told if isinstance(event, WorkerLost)]

    def pid(self, number: int = 0) -> int:
        return int(self.pool.status().replicas[number].detail["pid"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not condition():  # noqa: ASYNC110  # it depends on processes, which set no event
            await asyncio.sleep(0.01)


@pytest.fixture(params=[2, 1], ids=["two workers", "one worker"])
async def world(request: pytest.FixtureRequest, nothing_left: None) -> AsyncIterator[World]:
    """A pool of touchy models; afterwards no process, thread or descriptor of it is left."""
    told: list[Event] = []
    load_options: dict[str, Any] = {}

    def make(_: int) -> ProcessReplica:
        spec = WorkerSpec(
            framework=PATH,
            path="",
            format="touchy",
            load_options=dict(load_options),
            signature=NUMBER.to_json(),
        )
        return ProcessReplica(spec, NUMBER)

    options = PoolOptions(smallest=request.param, largest=request.param, adaptive=True, slo_s=0.1, hang_limit_s=0.2)
    pool = Pool(make, options, fingerprint=NUMBER.canonical, tell=told.append)
    await pool.start(prove)
    yield World(pool, told, load_options)
    await pool.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=["killed", "crashed"])
async def test_a_worker_that_is_killed_from_outside(world: World, number: int) -> None:
    """The rows of its batch are run elsewhere, or their callers are told; nobody else notices, and it is replaced."""
    crowd = Crowd(world.pool)

    async def strike() -> None:
        os.kill(world.pid(), number)
        await until(lambda: len(world.lost()) == 1)

    await crowd.during(strike)
    assert signal.Signals(number).name in world.lost()[0]
    if len(world.pool.status().replicas) == 2:
        assert not crowd.errors
    else:
        assert crowd.errors["WorkerDied"] <= CALLERS
    assert world.pool.status().restarts == 1


async def test_a_worker_that_is_stopped_in_its_tracks(world: World) -> None:
    """A SIGSTOP looks like a hang: the callers of its batch get their deadlines, then it is killed and replaced."""
    crowd = Crowd(world.pool, IMPATIENT_S)

    async def strike() -> None:
        for number in range(len(world.pool.status().replicas)):
            os.kill(world.pid(number), signal.SIGSTOP)
        await until(lambda: len(world.lost()) > 0)
        for replica in world.pool.status().replicas:  # one that had no batch was not missed
            if replica.state == "ready":
                os.kill(replica.detail["pid"], signal.SIGCONT)

    await crowd.during(strike)
    assert "SIGKILL" in world.lost()[0]
    assert crowd.errors["DeadlineExceeded"] > 0


@pytest.mark.parametrize(
    ("fault", "name"),
    [(SEGFAULT, "SIGSEGV"), (KILLED, "SIGKILL"), (GONE, "exit status 3"), (GARBAGE, "no frame"), (LIE, "protocol")],
    ids=["segfault", "killed", "exit", "garbage", "lie"],
)
async def test_an_input_that_ends_its_worker(world: World, fault: float, name: str) -> None:
    """It is refused after the second time, its batch-mates are answered, and the workers are replaced."""
    crowd = Crowd(world.pool)

    async def strike() -> Exception | None:
        for _ in range(200):
            error = await crowd.ask(fault)
            if isinstance(error, InferenceFailed):
                return error
            await asyncio.sleep(0.02)
        return error

    verdict = await crowd.during(strike)
    assert isinstance(verdict, InferenceFailed)
    assert "twice" in str(verdict)
    assert len(world.lost()) == 2
    assert any(name in reason for reason in world.lost())
    assert world.pool.status().batches.quarantined == 1
    if len(world.pool.status().replicas) == 2:
        assert crowd.errors["WorkerDied"] == 0


@pytest.mark.parametrize("world", [2], indirect=True, ids=["two workers"])
async def test_a_client_that_repeats_a_deadly_input_leaves_the_others_a_worker(world: World) -> None:
    """While one client sends the same deadly row again and again, there is always a worker for the others."""
    crowd, fewest = Crowd(world.pool), 2

    async def strike() -> list[Exception | None]:
        nonlocal fewest
        answers: list[Exception | None] = []
        while len(answers) < 100:
            asking = asyncio.create_task(Crowd(world.pool, IMPATIENT_S).ask(SEGFAULT))
            while not asking.done():
                await asyncio.wait([asking], timeout=0.005)
                fewest = min(fewest, sum(supervisor.alive for supervisor in world.pool._supervisors))
            answers.append(asking.result())
            await asyncio.sleep(0.01)
        return answers

    answers = await crowd.during(strike)
    assert all(isinstance(each, InferenceFailed | DeadlineExceeded) for each in answers)
    assert isinstance(answers[-1], InferenceFailed)
    assert fewest == 1
    assert len(world.lost()) == 2
    assert not crowd.errors
    assert not any(isinstance(event, CircuitOpened) for event in world.told)


@pytest.mark.parametrize("fault", [LOOP, STUCK, DEAF], ids=["endless loop", "holding the lock", "deaf"])
async def test_an_input_that_makes_its_worker_hang(world: World, fault: float) -> None:
    """Its callers get their deadlines, the worker is killed whatever it does, and another takes over."""
    crowd = Crowd(world.pool, IMPATIENT_S)
    await crowd.during(lambda: _strike_once(crowd, world, fault))
    assert "SIGKILL" in world.lost()[0]
    assert crowd.answered > 0


async def _strike_once(crowd: Crowd, world: World, fault: float) -> None:
    assert await crowd.ask(fault) is not None
    await until(lambda: len(world.lost()) > 0)


@pytest.mark.parametrize(
    ("fault", "name"), [(RAISE, "ValueError"), (EXIT, "SystemExit"), (MEMORY, "MemoryError")], ids=str
)
async def test_an_input_that_the_model_raises_on(world: World, fault: float, name: str) -> None:
    """It fails alone, even when the model wants to exit or has no memory left; the worker lives on."""
    crowd = Crowd(world.pool)
    error = await crowd.during(lambda: crowd.ask(fault))
    assert isinstance(error, InferenceFailed)
    assert name in str(error)
    assert crowd.errors == {type(error).__name__: 1}
    assert isinstance(error, OutOfMemory) is (fault == MEMORY)
    assert world.lost() == []


async def test_replacements_that_do_not_start_at_first(world: World, tmp_path: Path) -> None:
    """While replacements fail to start they are tried again with pauses; then all is as before."""
    broken = tmp_path / "broken"
    broken.touch()
    world.load_options.update({"first": "fail while", "file": str(broken)})
    crowd = Crowd(world.pool)

    async def strike() -> None:
        os.kill(world.pid(), signal.SIGKILL)
        await until(lambda: len(world.lost()) == 2)
        broken.unlink()

    await crowd.during(strike)
    assert "still no weights" in world.lost()[1]


async def test_a_replacement_that_starts_slowly(world: World, tmp_path: Path) -> None:
    """Until it is there, two workers' callers are answered by the other, and a lone worker's refused in time."""
    gate = tmp_path / "gate"
    world.load_options.update({"gate": str(gate)})
    alone = len(world.pool.status().replicas) == 1
    crowd = Crowd(world.pool, IMPATIENT_S if alone else PATIENT_S)

    async def strike() -> None:
        os.kill(world.pid(), signal.SIGKILL)
        await until(lambda: len(world.lost()) == 1)
        for number in range(1 if alone else CALLERS):  # the rows that the dead worker had wait for its successor
            error = await crowd.ask(float(CALLERS + number))
            assert alone or error is None
        assert world.pool.status().replicas[0].state == "starting"
        gate.touch()

    await crowd.during(strike)
    assert len(world.lost()) == 1
    assert alone or not crowd.errors


async def test_a_replacement_that_hangs_while_it_starts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed at the limit for starts, and the next one takes its place."""
    (supervisor, *_) = world.pool._supervisors
    world.load_options.update({"first": "hang"})
    crowd = Crowd(world.pool)

    async def strike() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "_start_limit_s", 0.3)
            os.kill(world.pid(), signal.SIGKILL)
            await until(lambda: len(world.lost()) == 2)
        world.load_options.clear()

    await crowd.during(strike)
    assert "did not start" in world.lost()[1]
    assert "SIGKILL" in world.lost()[1]


async def test_replacements_for_which_there_is_no_process(world: World) -> None:
    """A host that cannot start a process for a while tries again, and heals."""
    crowd = Crowd(world.pool)

    async def strike() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", "/nonexistent/python")
            os.kill(world.pid(), signal.SIGKILL)
            await until(lambda: len(world.lost()) == 2)

    await crowd.during(strike)
    assert "could not be started" in world.lost()[1]


async def test_replacements_that_never_start_open_the_circuit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few failed starts the pool is not ready and says so at once; when starting works again, it heals."""
    monkeypatch.setattr(circuit, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(circuit, "_OPEN_PAUSE_S", 0.5)
    monkeypatch.setattr(circuit, "_WELL_S", 0.2)
    broken = tmp_path / "broken"
    broken.touch()
    world.load_options.update({"first": "fail while", "file": str(broken)})
    for number in range(len(world.pool.status().replicas)):
        os.kill(world.pid(number), signal.SIGKILL)
    await until(lambda: any(isinstance(event, CircuitOpened) for event in world.told))
    assert not world.pool.alive
    assert isinstance(await Crowd(world.pool).ask(1.0), NotReady)
    broken.unlink()
    await until(lambda: world.pool.alive)
    assert await Crowd(world.pool).ask(1.0) is None
