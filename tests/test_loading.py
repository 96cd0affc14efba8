"""One version into service and out again."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

import modelserve as ms
from modelserve import loading
from modelserve.artifacts import DiskCache
from modelserve.config import ModelOptions
from modelserve.errors import ArtifactUnsafe, LoadFailed
from modelserve.execution import cores, thread
from modelserve.loading import Loader
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
    monkeypatch.setattr(loading, "_WARM_UP_LIMIT_S", 0.05)
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
    allowed = Runtime(allow_code=True, allow_pickle=True, factories=("nets:make",), threads=2, compile=True)
    assert sorted(asked, key=lambda runtime: runtime.device) == [
        dataclasses.replace(allowed, device=device) for device in ("cuda:0", "cuda:0", "cuda:1")
    ]
    asked.clear()
    await (await loader.load(registry.get("m", "1"), ModelOptions(threads=5))).unload()
    assert asked == [Runtime(threads=5)]


async def test_padded_batches_have_few_sizes(
    loader: Loader, registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``pad_batches`` the model meets powers of two alone, and each request gets its own answer."""
    from modelserve.adapters.frameworks.sklearn.model import SklearnModel  # noqa: PLC0415  # as above

    sizes: set[int] = set()
    infer = SklearnModel.infer

    def recording(self: SklearnModel, columns: Any) -> Any:
        sizes.add(len(columns["x"]))
        return infer(self, columns)

    monkeypatch.setattr(SklearnModel, "infer", recording)
    loaded = await loader.load(registry.get("m", "1"), ModelOptions(pad_batches=True))
    rows = [loaded.signature.validate({"x": [float(i)]}) for i in range(7)]
    answers: Any = await loaded.pool.submit(rows, asyncio.get_running_loop().time() + 30)
    assert [tells(answer, i) for i, answer in enumerate(answers)] == [1] * 7
    assert {size.bit_count() for size in sizes} == {1}
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
    await asyncio.get_running_loop().run_in_executor(loader._executor, lambda: None)
    await asyncio.sleep(0)
    loaded = await loader.load(version, ModelOptions())  # a fetch that was under way has come back by now
    await loaded.unload()
    assert await no_replica_is_left()
    assert +loader._cache._of_this_process()._leases == {}
