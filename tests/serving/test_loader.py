"""One version into service and out again."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import orjson
import pytest

import modelserve as ms
from modelserve.artifacts import DiskCache
from modelserve.config import ModelOptions
from modelserve.errors import ArtifactUnsafe, LoadFailed, TooLittleMemory
from modelserve.execution import cores, thread
from modelserve.serving import loader as loader_module
from modelserve.serving import warmup
from modelserve.serving.host_memory import Memory
from modelserve.serving.loader import Loader
from modelserve.serving.version import LoadedVersion
from modelserve.testing.models import tells, telltale
from modelserve.types import Runtime

X = np.array([[1.0], [2.0], [3.0]])


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with one version, in staging."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", telltale(1), example=X)
    return registry


@pytest.fixture
def loader(registry: ms.Registry, tmp_path: Path) -> Iterator[Loader]:
    """A loader on an empty cache."""
    with ThreadPoolExecutor(2) as threads:
        yield Loader(registry.artifacts, DiskCache(tmp_path / "cache"), threads)


def replicas() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("modelserve-m-")]


async def no_replica_is_left() -> bool:
    """Whether every replica's thread ends: the last thing it does is to say that it has."""
    found = replicas()
    for each in found:
        await asyncio.to_thread(each.join, 10)
    return not any(each.is_alive() for each in found)


async def test_a_loaded_version_answers_and_is_freed_after_its_last_request(
    loader: Loader, registry: ms.Registry
) -> None:
    """Unloading waits for the requests that hold the version, then ends its threads and lets go of its artifact."""
    before = set(replicas())
    loaded = await loader.load(registry.get("m", "1"), ModelOptions(replicas=2))
    assert len(set(replicas()) - before) == 2
    with loaded:
        unloading = asyncio.create_task(loaded.unload())
        row = loaded.signature.validate({"x": [5.0]})
        answer: Any = await loaded.pool.submit([row], asyncio.get_running_loop().time() + 10)
        assert tells(answer[0], 5) == 1
        assert not unloading.done()
    await unloading
    assert not loaded.pool.alive
    assert loader._cache._of_this_process()._leases[registry.get("m", "1").artifact.key] == 0


async def test_every_batch_size_is_warmed_up(
    loader: Loader, registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a version answers anybody, it ran batches of 1, 2, 4 … up to its largest, and its golden example."""
    from modelserve.adapters.frameworks.sklearn.model import SklearnModel  # noqa: PLC0415  # patched for this test alone

    sizes: list[int] = []
    infer = SklearnModel.infer

    def recording(self: SklearnModel, columns: Any) -> Any:
        sizes.append(len(columns["x"]))
        return infer(self, columns)

    monkeypatch.setattr(SklearnModel, "infer", recording)
    loaded = await loader.load(registry.get("m", "1"), ModelOptions(max_batch_size=16))
    assert list(dict.fromkeys(sizes)) == [1, 2, 4, 8, 16, 3]
    await loaded.unload()
    sizes.clear()
    loaded = await loader.load(registry.get("m", "1"), ModelOptions(max_batch_size=16, replicas=3, max_wait_ms=500))
    assert all(sizes.count(size) >= 3 for size in (1, 2, 4, 8, 16, 3))
    await loaded.unload()


async def test_a_model_that_hangs_in_its_warm_up_is_refused(
    loader: Loader, registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up that does not end is a failed load, and does not hold up whoever waits for it."""
    from modelserve.adapters.frameworks.sklearn.model import SklearnModel  # noqa: PLC0415  # patched for this test alone

    release = threading.Event()
    monkeypatch.setattr(SklearnModel, "infer", lambda *_: release.wait(30))
    monkeypatch.setattr(warmup, "_WARM_UP_LIMIT_S", 0.05)
    monkeypatch.setattr(thread, "_STOP_S", 0.05)
    with pytest.raises(LoadFailed, match="did not end"):
        await loader.load(registry.get("m", "1"), ModelOptions())
    release.set()


async def test_a_load_that_fails_leaves_nothing_behind(loader: Loader, registry: ms.Registry) -> None:
    """A version that does not pass its proof leaves no thread and no lease."""
    good = registry.get("m", "1")
    wrong = orjson.dumps({"inputs": [{"x": [1.0]}], "outputs": [0.0]})
    registry._insert(
        model_name="m",
        version="wrong",
        framework="sklearn",
        artifact=good.artifact,
        signature=good.signature,
        load_options=good.load_options,
        example=registry.artifacts.put_bytes(wrong, format="example-json"),
        conversion=None,
        metrics={},
        tags={},
        actor=None,
        reason="",
    )
    with pytest.raises(LoadFailed, match="golden example"):
        await loader.load(registry.get("m", "wrong"), ModelOptions())
    assert await no_replica_is_left()
    assert +loader._cache._of_this_process()._leases == {}


async def test_a_pickle_is_refused_by_the_loader(loader: Loader, registry: ms.Registry) -> None:
    """Whether pickles load is the serving side's option, not the registering side's."""
    pickled = registry.register("m", "pickled", telltale(1), example=X, format="joblib")
    with pytest.raises(ArtifactUnsafe):
        await loader.load(pickled, ModelOptions())
    loaded = await loader.load(pickled, ModelOptions(allow_pickle=True))
    await loaded.unload()


async def test_the_operator_says_how_a_version_may_run(
    loader: Loader, registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices are dealt out to the replicas in turn, threads shared among them, consent handed on as it was given."""
    from modelserve.adapters.frameworks.sklearn import SklearnFramework  # noqa: PLC0415  # patched for this test alone

    asked: list[Runtime] = []
    load = SklearnFramework.load

    def recording(self: SklearnFramework, path: Any, format: str, load_options: Any, runtime: Runtime) -> Any:  # noqa: A002
        asked.append(runtime)
        return load(self, path, format, load_options)

    monkeypatch.setattr(SklearnFramework, "load", recording)
    monkeypatch.setattr(cores, "cores", lambda: 7)
    options = ModelOptions(
        replicas=3,
        device=("cuda:0", "cuda:1"),
        compile=True,
        allow_code=True,
        allow_pickle=True,
        factories=("nets:make",),
    )
    await (await loader.load(registry.get("m", "1"), options)).unload()
    sha256 = registry.get("m", "1").artifact.sha256
    allowed = Runtime(
        allow_code=True, allow_pickle=True, factories=("nets:make",), threads=2, compile=True, sha256=sha256
    )
    assert sorted(asked, key=lambda runtime: runtime.device) == [
        dataclasses.replace(allowed, device=device) for device in ("cuda:0", "cuda:0", "cuda:1")
    ]
    asked.clear()
    await (await loader.load(registry.get("m", "1"), ModelOptions(threads=5))).unload()
    assert asked == [Runtime(threads=5, sha256=sha256)]


async def test_padded_batches_have_few_sizes(
    loader: Loader, registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``pad_batches`` a model meets few sizes, all of them in its warm-up, and requests get their own answers."""
    from modelserve.adapters.frameworks.sklearn.model import SklearnModel  # noqa: PLC0415  # as above

    sizes: set[int] = set()
    infer = SklearnModel.infer

    def recording(self: SklearnModel, columns: Any) -> Any:
        sizes.add(len(columns["x"]))
        return infer(self, columns)

    monkeypatch.setattr(SklearnModel, "infer", recording)
    loaded = await loader.load(registry.get("m", "1"), ModelOptions(pad_batches=True, max_batch_size=24))
    assert sizes == {1, 2, 4, 8, 16, 24}
    rows = [loaded.signature.validate({"x": [float(i)]}) for i in range(7)]
    answers: Any = await loaded.pool.submit(rows, asyncio.get_running_loop().time() + 30)
    assert [tells(answer, i) for i, answer in enumerate(answers)] == [1] * 7
    assert sizes == {1, 2, 4, 8, 16, 24}
    await loaded.unload()


async def test_a_cancelled_load_leaves_nothing_behind(loader: Loader, registry: ms.Registry) -> None:
    """However far a load has come when it is cancelled, it frees what it had."""
    version = registry.get("m", "1")
    for turns in range(0, 60, 6):
        task = asyncio.create_task(loader.load(version, ModelOptions()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            await outcome.unload()
    await asyncio.get_running_loop().run_in_executor(loader._threads.loads, lambda: None)
    await asyncio.sleep(0)
    loaded = await loader.load(version, ModelOptions())  # a fetch that was under way has come back by now
    await loaded.unload()
    assert await no_replica_is_left()
    assert +loader._cache._of_this_process()._leases == {}


# -- in place of another -----------------------------------------------------------------------------------


class LittleMemory(Memory):
    """Tells what a test says."""

    def __init__(self, available: int | None, taken: int | None = None, total: int | None = None) -> None:
        super().__init__()
        self._figures = available, taken, total

    def total(self) -> int | None:
        return self._figures[2]

    def available(self) -> int | None:
        return self._figures[0]

    def taken_by(self, pid: int) -> int | None:
        return self._figures[1]


def running() -> int:
    return sum(each.is_alive() for each in replicas())


async def answers(loaded: LoadedVersion) -> int:
    """Return which version answers."""
    with loaded:
        answer: Any = await loaded.pool.submit(
            [loaded.signature.validate({"x": [5.0]})], asyncio.get_running_loop().time() + 10
        )
    return tells(answer[0], 5)


async def full(loaded: LoadedVersion) -> int:
    """Return how many replicas answer when all that are to start have started."""
    await loaded.hand_over.grown()
    await asyncio.gather(*loaded.pool._opening.values())
    return sum(replica.state == "ready" for replica in loaded.pool.status().replicas)


@pytest.fixture
def at_load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], None]:
    """Have something done whenever a replica loads its model, in its thread: told how many there are with this one."""
    from modelserve.adapters.frameworks.sklearn import SklearnFramework  # noqa: PLC0415  # patched for these tests alone

    load, models = SklearnFramework.load, weakref.WeakSet[Any]()

    def install(hook: Callable[[int], object]) -> None:
        def hooked(self: SklearnFramework, *args: Any) -> Any:
            hook(len(models) + 1)
            model = load(self, *args)
            models.add(model)
            return model

        monkeypatch.setattr(SklearnFramework, "load", hooked)

    return install


@pytest.mark.promise("P7")
@pytest.mark.parametrize(("replicas", "most"), [(1, 2), (2, 2), (3, 3)])
async def test_replicas_are_replaced_without_ever_having_more_of_them(
    loader: Loader, registry: ms.Registry, at_load: Callable[..., None], replicas: int, most: int
) -> None:
    """The new version takes the room of one replica, and all of it when the old one is gone. One always answers."""
    registry.register("m", "2", telltale(2), example=X)
    options = ModelOptions(replicas=replicas, reload="replace")
    seen: list[int] = []
    at_load(seen.append)
    old = await loader.load(registry.get("m", "1"), options)
    seen.clear()
    new = await loader.load(registry.get("m", "2"), options, beside=old)
    assert (await answers(old), await answers(new)) == (1, 2)
    assert (old.pool.size, new.pool.size) == (max(1, replicas - 1), 1)
    await old.unload()
    assert await full(new) == replicas
    assert len(seen) == replicas
    assert max(seen) == most
    assert await answers(new) == 2
    await new.unload()
    assert await no_replica_is_left()
    assert +loader._cache._of_this_process()._leases == {}


@pytest.mark.promise("P4")
@pytest.mark.parametrize("outcome", ["fails", "is cancelled", "is not wanted"])
async def test_a_version_that_does_not_take_over_gives_its_room_back(
    loader: Loader, registry: ms.Registry, at_load: Callable[..., None], outcome: str
) -> None:
    """The old version serves all along and has its full number of replicas again; the next one can have the room."""
    registry.register("m", "2", telltale(2), example=X)
    options = ModelOptions(replicas=2, reload="replace")
    old = await loader.load(registry.get("m", "1"), options)
    begun, hold, failing = threading.Event(), threading.Event(), [outcome == "fails"]

    def hook(_: int) -> None:
        begun.set()
        if failing and failing.pop():
            raise RuntimeError("no weights")
        if outcome == "is cancelled":
            hold.wait(10)

    at_load(hook)
    loading = asyncio.create_task(loader.load(registry.get("m", "2"), options, beside=old))
    await asyncio.to_thread(begun.wait, 10)
    if outcome == "is cancelled":
        assert old.pool.size == 1
        assert await answers(old) == 1
        loading.cancel()
        hold.set()
    (result,) = await asyncio.gather(loading, return_exceptions=True)
    if outcome == "fails":
        assert isinstance(result, LoadFailed)
    elif outcome == "is not wanted":
        assert isinstance(result, LoadedVersion)
        await result.unload()
    assert await full(old) == 2
    assert await answers(old) == 1
    new = await loader.load(registry.get("m", "2"), options, beside=old)
    await old.unload()
    assert await full(new) == 2
    await new.unload()
    assert await no_replica_is_left()


@pytest.mark.promise("P4")
async def test_a_load_that_ends_after_its_pool_has_started_gives_the_room_back(
    loader: Loader, registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look at the options may fail too: the version that serves has its full number of replicas again."""
    options = ModelOptions(replicas=2, reload="replace")
    old = await loader.load(registry.get("m", "1"), options)
    second = registry.register("m", "2", telltale(2), example=X)
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "misfits", Mock(side_effect=OSError("no figures")))
        with pytest.raises(OSError, match="no figures"):
            await loader.load(second, options, beside=old)
    assert await full(old) == 2
    async with asyncio.timeout(30):
        new = await loader.load(second, options, beside=old)
    await old.unload()
    assert await full(new) == 2
    await new.unload()
    assert await no_replica_is_left()


async def test_only_one_version_at_a_time_has_the_room(
    loader: Loader, registry: ms.Registry, at_load: Callable[..., None]
) -> None:
    """A third version waits until the second one is gone, and until the first one is when the second took over."""
    for number in (2, 3):
        registry.register("m", str(number), telltale(number), example=X)
    options = ModelOptions(replicas=2, reload="replace")
    seen: list[int] = []
    at_load(seen.append)
    first = await loader.load(registry.get("m", "1"), options)
    second = await loader.load(registry.get("m", "2"), options, beside=first)
    third = asyncio.create_task(loader.load(registry.get("m", "3"), options, beside=first))
    await second.unload()
    unwanted = await third
    await unwanted.unload()
    second = await loader.load(registry.get("m", "2"), options, beside=first)
    with first:
        leaving = asyncio.create_task(first.unload())
        third = asyncio.create_task(loader.load(registry.get("m", "3"), options, beside=second))
        while not second.hand_over._lent.locked():  # noqa: ASYNC110  # a fetch in a thread comes before it, which tells nobody
            await asyncio.sleep(0)
        begun = len(seen)
        await asyncio.wait([leaving], timeout=0)
        assert len(seen) == begun
        assert not third.done()
    await leaving
    last = await third
    assert await answers(last) == 3
    await second.unload()
    assert await full(last) == 2
    assert max(seen) == 2
    await last.unload()
    assert await no_replica_is_left()


def beside_little(loader: Loader, available: int | None, taken: int | None = None) -> Loader:
    return Loader(loader._store, loader._cache, loader._threads.loads, memory=LittleMemory(available, taken))


@pytest.mark.promise("P4")
async def test_a_canary_leaves_memory_for_what_is_still_to_be_loaded(loader: Loader, registry: ms.Registry) -> None:
    """It is refused where production would not fit beside it any more, also where replicas are replaced."""
    second, third = (registry.register("m", number, telltale(int(number)), example=X) for number in ("2", "3"))
    options = ModelOptions(reload="replace")
    first = await loader.load(registry.get("m", "1"), options)
    need = 3 * (second.artifact.size + third.artifact.size)
    with pytest.raises(TooLittleMemory, match=r"of which .* MB are for versions that are still to be loaded"):
        await beside_little(loader, need - 1).load(second, options, role="canary", beside=first, rivals=[third])
    canary = await beside_little(loader, need).load(second, options, role="canary", beside=first, rivals=[third])
    assert (first.pool.size, canary.pool.size) == (1, 1)
    with pytest.raises(TooLittleMemory):  # before production is there to be compared with
        await beside_little(loader, need - 1).load(second, options, role="canary", rivals=[third])
    for each in (canary, first):
        await each.unload()


@pytest.mark.promise("P4")
async def test_a_version_that_memory_has_no_room_for_is_refused(loader: Loader, registry: ms.Registry) -> None:
    """Nothing is fetched or started beside what serves; the sentence has the figures and the way out."""
    second = registry.register("m", "2", telltale(2), example=X)
    options = ModelOptions(replicas=2)
    first = await loader.load(registry.get("m", "1"), options)
    before = running()
    short = beside_little(loader, 2 * 3 * second.artifact.size - 1)
    with pytest.raises(LoadFailed, match=r'too little memory .* beside 1: 2 x .* MB .*reload="replace"'):
        await short.load(second, options, beside=first)
    assert running() == before
    enough = beside_little(loader, 2 * 3 * second.artifact.size)
    for may in (enough, beside_little(loader, None)):
        await (await may.load(second, options, beside=first)).unload()
    replacing = ModelOptions(replicas=2, reload="replace")
    await (await short.load(second, replacing, beside=first)).unload()
    await (await short.load(second, options)).unload()
    await first.unload()


async def test_options_that_cannot_work_are_said_after_the_warm_up(
    loader: Loader, registry: ms.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning has the option and what was measured; the version serves all the same, and keeps them to be shown."""
    version = registry.get("m", "1")
    fits = await loader.load(version, ModelOptions())
    assert (fits.warnings, caplog.messages) == ((), [])
    options = ModelOptions(slo_ms=1e-6, queue_limit=8, max_batch_size=16, replicas=2)
    little = Loader(loader._store, loader._cache, loader._threads.loads, memory=LittleMemory(None, None, total=10))
    loaded = await little.load(version, options)
    assert [each.partition("=")[0] for each in loaded.warnings] == ["slo_ms", "max_batch_size", "replicas"]
    assert caplog.messages == [f"misconfigured: m 1: {each}" for each in loaded.warnings]
    assert await answers(loaded) == 1
    for each in (fits, loaded):
        await each.unload()


async def test_the_estimate_is_what_the_workers_of_the_present_version_take(
    loader: Loader, registry: ms.Registry
) -> None:
    """Where replicas are processes, what they were measured to take is asked for each replica of the next one."""
    options = ModelOptions(executor="process")
    version = registry.get("m", "1")
    first = await loader.load(version, options)
    with pytest.raises(LoadFailed, match=r"1 x 700 MB would be needed, 600 MB are available"):
        await beside_little(loader, 600_000_000, 700_000_000).load(version, options, beside=first)
    pids = [replica.detail["pid"] for replica in first.pool.status().replicas]
    _, taken = loader._look_at_memory(pids)
    assert taken is None or taken > 5_000_000
    await first.unload()
