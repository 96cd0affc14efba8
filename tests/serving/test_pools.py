"""Servers whose models run in pools of worker processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import modelserve as ms
from modelserve.events import WorkerLost
from modelserve.testing.models import tells, telltale
from modelserve.types import PoolStatus

X = np.array([[1.0], [2.0]])
OPTIONS = ms.ModelOptions(executor="process")


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with two versions of the model ``m``, the first in production."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    for number in (1, 2):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")
    return registry


@pytest.fixture
async def server(registry: ms.Registry, tmp_path: Path) -> AsyncIterator[ms.AsyncModelServer]:
    """A started server with one worker process."""
    async with ms.AsyncModelServer(registry, {"m": OPTIONS}, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        yield server


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for a good while at most."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # it depends on processes, which set no event
            await asyncio.sleep(0.01)


def pool(server: ms.AsyncModelServer) -> PoolStatus:
    status = server.status()[0].pool
    assert status is not None
    return status


def workers(server: ms.AsyncModelServer) -> list[int]:
    return [replica.detail["pid"] for replica in pool(server).replicas if replica.detail["pid"]]


async def test_concurrent_callers_get_their_own_answers(server: ms.AsyncModelServer, no_blocking: None) -> None:
    """A thousand concurrent requests are answered by another process, each with its own, and the loop never blocks."""
    answers = await asyncio.gather(*(server.predict("m", {"x": [float(i)]}) for i in range(1000)))
    assert [tells(answer.prediction, i) for i, answer in enumerate(answers)] == [1] * 1000
    assert workers(server) != [os.getpid()]


async def test_versions_are_swapped_under_load(server: ms.AsyncModelServer, registry: ms.Registry) -> None:
    """While workers are replaced by those of another version, every request is answered by one of the two."""
    promoted = asyncio.Event()

    async def caller(x: float) -> set[str]:
        seen = set()
        while not promoted.is_set():
            answer = await server.predict("m", {"x": [x]})
            assert tells(answer.prediction, x) == int(answer.model_version)
            seen.add(answer.model_version)
        return seen

    callers = [asyncio.create_task(caller(float(i))) for i in range(16)]
    registry.promote("m", "2")
    await until(lambda: server.status()[0].production == "2")
    promoted.set()
    assert set().union(*await asyncio.gather(*callers)) >= {"1"}
    assert tells((await server.predict("m", {"x": [3.0]})).prediction, 3) == 2


@pytest.mark.promise("P1")
async def test_a_killed_worker_takes_readiness_away_until_it_is_replaced(server: ms.AsyncModelServer) -> None:
    """After a SIGKILL the model is not ready, observers hear of it, and it answers again by itself."""
    lost: list[Any] = []
    server.observe(lambda event: lost.append(event) if isinstance(event, WorkerLost) else None)
    (worker,) = workers(server)
    os.kill(worker, signal.SIGKILL)
    await until(lambda: not server.ready)
    await until(lambda: server.ready)
    assert tells((await server.predict("m", {"x": [3.0]})).prediction, 3) == 1
    assert workers(server) != [worker]
    assert pool(server).restarts == 1
    assert "SIGKILL" in lost[0].reason


async def test_the_pool_is_shown_over_http_without_process_ids(server: ms.AsyncModelServer) -> None:
    """``GET /models/m`` shows replicas, batches and the learned cost, and nothing that only the host should know."""
    await asyncio.gather(*(server.predict("m", {"x": [float(i)]}) for i in range(10)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(ms.asgi(server)), base_url="http://host") as client:
        answer = (await client.get("/models/m")).json()
        shown = answer["pool"]
    assert shown["replicas"] == [{"state": "ready", "restarts": 0}]
    assert shown["batches"]["count"] == sum(shown["batches"]["sizes"].values()) > 0
    assert shown["batches"]["max_rows"] == 256
    assert shown["service_time"]["fixed_s"] > 0
    assert str(workers(server)[0]) not in str(answer)


async def test_an_artifact_that_may_not_be_loaded_is_refused_by_the_worker(tmp_path: Path) -> None:
    """The reason why a worker does not load a version reaches the status as it would from a thread."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", telltale(1), example=X, format="joblib")
    registry.promote("m", "1")
    async with ms.AsyncModelServer(registry, {"m": OPTIONS}, cache_dir=tmp_path / "cache") as server:
        assert not server.ready
        assert "allow_pickle=True" in str(server.status()[0].problem)
