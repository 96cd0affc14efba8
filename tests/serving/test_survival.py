"""What keeps serving while something is wrong, heals by itself, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.base import BaseEstimator

import modelserve as ms
from modelserve.artifacts import ArtifactStore, DiskCache
from modelserve.events import LoadRejected
from modelserve.execution import thread
from modelserve.serving.host_memory import Memory
from modelserve.serving.loads import Loads
from modelserve.serving.snapshots import artifact_keys_in
from modelserve.testing.models import STEP, tells, telltale
from tests.servers import PostgresServer, S3Artifacts

X = np.array([[1.0], [2.0]])


async def until(condition: Callable[[], bool], server: ms.AsyncModelServer) -> None:
    """Wait for the next events of a server until the condition holds."""
    changed = asyncio.Event()
    stop = server.observe(lambda _: changed.set())
    async with asyncio.timeout(30):
        while not condition():
            changed.clear()
            await changed.wait()
    stop()


async def answering(server: ms.AsyncModelServer) -> int:
    """Return which version answers; what it answers proves it."""
    answer = await server.predict("m", {"x": [3.0]}, timeout_ms=10_000)
    assert str(tells(answer.prediction, 3)) == answer.model_version
    return int(answer.model_version)


# -- a new version that is no good -------------------------------------------------------------------------


class Moody(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Answers as version 2 would, unless a file says what to do wrong."""

    def __init__(self, mood: Path) -> None:
        self.mood = mood

    def fit(self, x: Any) -> Moody:
        self.fitted_ = self.n_features_in_ = 1
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self._is("does not load"):
            raise RuntimeError("no weights")
        while self._is("loads for ever"):
            time.sleep(0.01)

    def predict(self, x: Any) -> Any:
        if self._is("does not run"):
            raise RuntimeError("no kernel")
        return np.asarray(x)[:, 0] + 2 * STEP + (500 if self._is("answers differently") else 0)

    def _is(self, mood: str) -> bool:
        return self.mood.exists() and self.mood.read_text(encoding="utf-8") == mood


FAULTS = ["is damaged", "does not load", "does not run", "answers differently", "loads for ever", "is too large"]


@pytest.mark.promise("P4")
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_version_leaves_the_old_one_serving_and_heals(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with a new version, the one before serves and is ready; the next try takes what was mended."""
    monkeypatch.setattr(thread, "_STOP_S", 0.05)
    mood = tmp_path / "mood"
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", telltale(1), example=X)
    moody = registry.register("m", "2", Moody(mood).fit(X), example=X, format="joblib")
    registry.promote("m", "1")
    blob = tmp_path / "artifacts" / moody.artifact.key
    good = blob.read_bytes()
    options = {"m": ms.ModelOptions(allow_pickle=True, start_limit_s=1.0)}
    async with ms.AsyncModelServer(registry, options, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        mood.write_text(fault, encoding="utf-8")
        with monkeypatch.context() as patched:
            if fault == "is damaged":
                blob.chmod(0o600)
                blob.write_bytes(good[:-1] + b"!")
            if fault == "is too large":
                patched.setattr(Memory, "available", lambda _: 1)
            refused: list[Any] = []
            server.observe(lambda event: refused.append(event) if isinstance(event, LoadRejected) else None)
            registry.promote("m", "2")
            await until(lambda: bool(refused), server)
            assert isinstance(refused[0].error, ms.LoadError)
            assert await answering(server) == 1
            assert server.ready
            assert "refused" in str(server.status()[0].problem)
        blob.write_bytes(good)
        mood.unlink()
        await until(lambda: server.status()[0].production == "2", server)
        assert await answering(server) == 2
        assert server.status()[0].problem is None


# -- what is kept loaded -----------------------------------------------------------------------------------


async def held(server: ms.AsyncModelServer) -> dict[str, int]:
    """Count what the versions of ``m`` hold when nothing is on its way in or out."""
    model = server._require_running().reconciler._reconcilers["m"]
    await model.settled()
    loads = model._loads
    for loaded in loads.loaded.values():
        await loaded.hand_over.grown()
        await asyncio.gather(*loaded.pool._opening.values())
    cache: Any = loads._loader._cache
    ended = [each for each in threading.enumerate() if each.name.startswith("modelserve-m-")]
    for each in ended[: -_replicas(loads)]:  # the last thing that a thread does is to say that it has ended
        await asyncio.to_thread(each.join, 0.5)
    return {
        "versions": len(loads.loaded),
        "leases": sum(cache._of_this_process()._leases.values()),
        "threads": sum(each.name.startswith("modelserve-m-") for each in threading.enumerate()),
        "processes": len(_children()),
        "descriptors": _descriptors(),
    }


def _descriptors() -> int:
    gc.collect()  # what an earlier test left to the collector is not this one's to count
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def _replicas(loads: Loads) -> int:
    return sum(loaded.pool.size for loaded in loads.loaded.values())


def _children() -> set[str]:
    """Name the child processes, where the system tells."""
    tasks = Path("/proc/self/task")
    lists = [task / "children" for task in tasks.iterdir()] if tasks.exists() else []
    return {pid for each in lists if each.exists() for pid in each.read_text(encoding="ascii").split()}


@pytest.mark.promise("P7")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "promotes", "kept"),
    [
        (ms.ModelOptions(), 51, 2),
        (ms.ModelOptions(keep_previous=False), 51, 1),
        (ms.ModelOptions(reload="replace", replicas=2), 12, 1),
        (ms.ModelOptions(executor="process"), 3, 2),
    ],
    ids=["kept", "not kept", "replaced", "processes"],
)
async def test_many_promotes_leave_at_most_two_versions_loaded(
    tmp_path: Path, options: ms.ModelOptions, promotes: int, kept: int
) -> None:
    """After any number of promotes there are the threads, processes, descriptors and leases of what is kept, no more.

    The version before takes over again at once where it is kept.
    """
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    for number in (1, 2, 3):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "poll_s": 3600, "log": False}
    async with ms.AsyncModelServer(registry, {"m": options}, **settings) as server:

        async def promote(number: int) -> None:
            registry.promote("m", str(number))
            await until(lambda: server.status()[0].production == str(number), server)
            assert await answering(server) == number

        for number in (2, 3, 1):
            await promote(number)
        before = await held(server)
        for i in range(promotes):
            await promote((i + 1) % 3 + 1)
        after = await held(server)
        assert after.pop("descriptors") <= before.pop("descriptors")  # those of earlier tests may still be closing
        assert after == before
        assert (after["versions"], after["leases"]) == (kept, 2 * kept)  # of each the model and its example
        assert server.status()[0].previous == ("3" if kept == 2 else None)
        loads: list[Any] = []
        server._require_running().executors.loads.submit = loads.append  # type: ignore[assignment]  # nothing can be fetched any more
        if kept == 2:
            registry.rollback("m")
            await until(lambda: server.status()[0].production == "3", server)
            assert loads == []


@pytest.mark.promise("P2")
@pytest.mark.parametrize("replicas", [1, 2])
async def test_replicas_are_replaced_under_load_without_a_failure(tmp_path: Path, replicas: int) -> None:
    """With ``reload="replace"`` every request is answered by the version that it names, promotion after promotion."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    register_two(registry)
    options = {"m": ms.ModelOptions(reload="replace", replicas=replicas)}
    async with ms.AsyncModelServer(registry, options, cache_dir=tmp_path / "cache", poll_s=3600) as server:
        stop = asyncio.Event()

        async def caller() -> set[int]:
            seen = set()
            while not stop.is_set():
                seen.add(await answering(server))
            return seen

        callers = [asyncio.create_task(caller()) for _ in range(8)]
        for number in (2, 1, 2):
            registry.promote("m", str(number))
            await until(lambda: server.status()[0].production == str(number), server)  # noqa: B023  # awaited at once
        stop.set()
        assert set().union(*await asyncio.gather(*callers)) == {1, 2}
        assert (await held(server))["threads"] == replicas


# -- without registry and store ----------------------------------------------------------------------------


class Gate:
    """A TCP port of our own in front of a server, which can be shut and opened again."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        if self._pumps:
            await asyncio.wait(self._pumps)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._behind)
        for source, target in ((reader, back), (there, writer)):
            self._open.add(target)
            pump = asyncio.create_task(self._pump(source, target))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()
        self._open.discard(target)


@pytest.fixture
async def gates() -> AsyncIterator[Callable[[int], Awaitable[Gate]]]:
    """Put open gates in front of ports."""
    made: list[Gate] = []

    async def gate(port: int) -> Gate:
        made.append(Gate(port))
        await made[-1].open()
        return made[-1]

    yield gate
    for each in made:
        await each.shut()


@pytest.mark.promise("P4")
async def test_a_start_without_database_and_object_store_serves_what_was_served_last(
    postgres_server: PostgresServer,
    postgres_url: str,
    s3_artifacts_url: S3Artifacts,
    tmp_path: Path,
    gates: Callable[[int], Awaitable[Gate]],
) -> None:
    """Everything it takes is on the disk. It is ready and says that it is stale; later it catches up."""
    endpoint = s3_artifacts_url.storage_options["client_kwargs"]["endpoint_url"]
    database, objects = await gates(postgres_server.port), await gates(int(endpoint.rpartition(":")[2]))
    url = postgres_url.replace(str(postgres_server.port), str(database.port))
    location = {"endpoint_url": f"http://127.0.0.1:{objects.port}", "region_name": "us-east-1"}
    options = {**s3_artifacts_url.storage_options, "client_kwargs": location}
    training = ms.Registry(
        postgres_url, artifacts=ArtifactStore(s3_artifacts_url.url, **s3_artifacts_url.storage_options)
    )
    await asyncio.to_thread(register_two, training)
    cache: dict[str, Any] = {"cache_dir": tmp_path / "cache", "poll_s": 0.05}

    with ms.Registry(url, artifacts=ArtifactStore(s3_artifacts_url.url, **options)) as serving:
        async with ms.AsyncModelServer(serving, **cache) as server:
            assert await answering(server) == 1
    await asyncio.gather(database.shut(), objects.shut())
    await asyncio.to_thread(training.promote, "m", "2")
    with ms.Registry(url, artifacts=ArtifactStore(s3_artifacts_url.url, **options)) as serving:
        async with ms.AsyncModelServer(serving, **cache) as server:
            assert await answering(server) == 1
            assert server.ready
            status, body = await health(server)
            assert (status, body["status"], body["models"]) == (200, "ready", {"m": "ready"})
            assert body["stale"].keys() == {"m"}
            await asyncio.gather(database.open(), objects.open())
            await until(lambda: server.status()[0].production == "2", server)
            assert await answering(server) == 2
            assert "stale" not in (await health(server))[1]
            await database.shut()
            async with asyncio.timeout(20):
                while "stale" not in (await health(server))[1]:  # noqa: ASYNC110  # the next look finds it, without an event
                    await asyncio.sleep(0.01)
            assert (await health(server))[0] == 200
            assert await answering(server) == 2
    training.close()


def register_two(registry: ms.Registry) -> None:
    for number in (1, 2):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")


async def health(server: ms.AsyncModelServer) -> tuple[int, dict[str, Any]]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(ms.asgi(server)), base_url="http://host") as client:
        answer = await client.get("/health/ready")
        return answer.status_code, answer.json()


async def test_what_a_start_without_the_registry_needs_is_not_pruned(tmp_path: Path) -> None:
    """While it serves all of it is in use, and afterwards it is spared: the model, and the example that proves it."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", telltale(1), example=X)
    registry.promote("m", "1")
    cache = DiskCache(tmp_path / "cache", spared=partial(artifact_keys_in, tmp_path / "cache"))
    async with ms.AsyncModelServer(registry, {"m": ms.ModelOptions()}, cache_dir=tmp_path / "cache"):
        assert [each.in_use for each in cache.entries()] == [True, True]
    assert [each.in_use for each in cache.entries()] == [False, False]
    assert cache.prune() == []
    version = registry.get("m", "1")
    assert version.example is not None
    assert {each.key for each in cache.entries()} == {version.artifact.key, version.example.key}
