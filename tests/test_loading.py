"""One version into service and out again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelserve as ms
from modelserve import loading
from modelserve.artifacts import DiskCache
from modelserve.config import ModelOptions
from modelserve.errors import ArtifactUnsafe, LoadFailed
from modelserve.execution import thread
from modelserve.loading import Loader, agrees
from modelserve.testing.models import tells, telltale

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
    from modelserve.adapters.frameworks.sklearn import SklearnModel  # noqa: PLC0415  # patched for this test alone

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
    from modelserve.adapters.frameworks.sklearn import SklearnModel  # noqa: PLC0415  # patched for this test alone

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


json = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.floats(-1e6, 1e6) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(json)
def test_a_value_agrees_with_itself(value: Any) -> None:
    """Every JSON value agrees with itself after a round trip."""
    assert agrees(value, orjson.loads(orjson.dumps(value)))


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        (1.0, 1.00001, True),
        (1.0, 1.01, False),
        (1.0, 1, True),
        (1, 2, False),
        ("a", "b", False),
        (True, 1, False),
        ([1.0, 2.0], [1.0, 2.0000001], True),
        ([1.0], [1.0, 2.0], False),
        ({"a": 1.0}, {"b": 1.0}, False),
        ({"a": None}, {"a": 0.0}, False),
    ],
)
def test_answers_agree_but_for_the_last_digits(wanted: Any, found: Any, *, same: bool) -> None:
    """Floats may differ as kernels differ; labels, shapes and names may not."""
    assert agrees(wanted, found) is same
