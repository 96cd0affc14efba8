"""What a replica loads is what was hashed, at every start: damage on the local disk heals, and no answer is from it."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from sklearn.tree import DecisionTreeRegressor

import modelserve as ms
from modelserve.artifacts import DiskCache, Lease, files
from modelserve.config import ModelOptions
from modelserve.errors import ArtifactCorrupt, BackendUnavailable
from modelserve.events import Event, LoadRejected, VersionLoaded
from modelserve.serving.loader import Loader
from modelserve.serving.provision import Provision
from modelserve.serving.version import LoadedVersion
from modelserve.signing import generate_keys, trusted_keys
from modelserve.types import Artifact
from tests.artifacts.conftest import model_folder
from tests.artifacts.stores import CountingStore

SEEN, UNSEEN = 1.0, 9.0  # the inputs that the golden example has, and has not
KEYS = generate_keys()
OPTIONS = ModelOptions(allow_pickle=True)


def answer_of(version: int, x: float) -> float:
    """Return what a version says to an input, and no other version to any."""
    return version + 0.125 if x == SEEN else 7000.0 + version


def tree_of(version: int) -> DecisionTreeRegressor:
    """Fit a tree that keeps each of its answers as a double of its own."""
    return DecisionTreeRegressor().fit([[SEEN], [UNSEEN]], [answer_of(version, SEEN), answer_of(version, UNSEEN)])


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with three signed versions, whose files can be changed without getting unreadable."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    for version in (1, 2, 3):
        example = np.array([[SEEN]])
        registry.register(
            "m", str(version), tree_of(version), example=example, format="joblib", signing_key=KEYS.private
        )
    return registry


@pytest.fixture
def loader(registry: ms.Registry, tmp_path: Path) -> Iterator[Loader]:
    """A loader on an empty cache."""
    with ThreadPoolExecutor(2) as threads:
        cache = DiskCache(tmp_path / "cache")
        yield Loader(registry.artifacts, cache, threads, trusted_keys=trusted_keys([KEYS.public]))


@pytest.fixture
def quarantine(tmp_path: Path) -> Callable[[], int]:
    """Count what was set aside."""
    return lambda: len(list((tmp_path / "cache" / "quarantine").glob("*")))


@pytest.fixture
def damage(tmp_path: Path, registry: ms.Registry) -> Callable[..., Path]:
    """Change one answer of a version in the cache to -666.0, in place."""

    def damage(version: int, x: float) -> Path:
        path = tmp_path / "cache" / registry.get("m", str(version)).artifact.key
        before, now = (struct.pack("<d", value) for value in (answer_of(version, x), -666.0))
        path.chmod(0o644)
        with path.open("r+b") as file:
            data = file.read()
            assert before in data
            file.seek(0)
            file.write(data.replace(before, now))
        return path

    return damage


@pytest.fixture
async def loaded(loader: Loader, registry: ms.Registry) -> AsyncIterator[Callable[..., Any]]:
    """Load version 1 in a way of running; it is freed at the end."""
    versions: list[LoadedVersion] = []

    async def load(**options: Any) -> LoadedVersion:
        version = await loader.load(registry.get("m", "1"), ModelOptions(allow_pickle=True, **options))
        versions.append(version)
        return version

    yield load
    for version in versions:
        await version.unload()


async def ask(loaded: LoadedVersion, x: float) -> float:
    """Return the answer of a version."""
    with loaded:
        row = loaded.signature.validate({"x": [x]})
        (answer,) = await loaded.pool.submit([row], asyncio.get_running_loop().time() + 30)
    assert isinstance(answer, float)
    return answer


async def killed(loaded: LoadedVersion) -> None:
    """Kill the only worker, and wait until its successor answers."""
    before = loaded.pool.status().replicas[0].detail["pid"]
    assert isinstance(before, int)
    os.kill(before, signal.SIGKILL)
    while not (loaded.pool.alive and loaded.pool.status().replicas[0].detail["pid"] != before):  # noqa: ASYNC110  # a seat has no event for it
        await asyncio.sleep(0.01)


# -- promotions --------------------------------------------------------------------------------------------


@pytest.mark.promise("P2", "P6")
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("x", [SEEN, UNSEEN])
async def test_a_version_damaged_since_it_was_served_is_right_when_it_is_back(
    registry: ms.Registry,
    tmp_path: Path,
    damage: Callable[..., Path],
    quarantine: Callable[[], int],
    x: float,
    signed: Literal[True, False],
) -> None:
    """One double is changed in place, seen by the golden example or not: no load is refused, the answer is right."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    keys = [KEYS.public] if signed else []
    server = ms.AsyncModelServer(registry, {"m": OPTIONS}, cache_dir=tmp_path / "cache", trusted_keys=keys)
    registry.promote("m", "1")
    server.observe(events.put_nowait)
    async with server:
        for version in ("2", "3", "1"):
            if version == "1":
                damage(1, x)
            registry.promote("m", version)
            event = await asyncio.wait_for(events.get(), 30)
            while not (isinstance(event, VersionLoaded) and event.version == version):
                assert not isinstance(event, LoadRejected)
                event = await asyncio.wait_for(events.get(), 30)
        assert (await server.predict("m", {"x": [x]})).prediction == answer_of(1, x)
    assert quarantine() == 1


@pytest.mark.promise("P6")
@pytest.mark.parametrize("missing", [True, False])
async def test_a_golden_example_that_is_damaged_or_gone_is_fetched_again(
    loader: Loader, loaded: Callable[..., Any], registry: ms.Registry, tmp_path: Path, missing: Literal[True, False]
) -> None:
    """A load of which only the example was damaged succeeds at once."""
    await loaded()
    example = registry.get("m", "1").example
    assert example is not None
    path = tmp_path / "cache" / example.key
    if missing:
        path.unlink()
    else:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    assert await ask(await loaded(), UNSEEN) == answer_of(1, UNSEEN)


# -- restarts and further replicas -------------------------------------------------------------------------


@pytest.mark.promise("P1", "P2", "P6")
@pytest.mark.timeout(120)
async def test_a_worker_restarts_from_the_registered_bytes(
    loaded: Callable[..., Any], damage: Callable[..., Path], quarantine: Callable[[], int], registry: ms.Registry
) -> None:
    """Whether its file was changed in place or removed meanwhile, its successor loads what was registered."""
    version = await loaded(executor="process")
    path = damage(1, UNSEEN)
    await killed(version)
    assert await ask(version, UNSEEN) == answer_of(1, UNSEEN)
    assert quarantine() == 1
    path.unlink()
    await killed(version)
    assert await ask(version, UNSEEN) == answer_of(1, UNSEEN)


@pytest.mark.promise("P2", "P6")
async def test_a_further_replica_loads_the_registered_bytes(
    loaded: Callable[..., Any], damage: Callable[..., Path], quarantine: Callable[[], int]
) -> None:
    """A pool that grows does so from what was registered, whatever became of the file since its first start."""
    version = await loaded(replicas=2)
    await version.pool.confine(1)
    damage(1, UNSEEN)
    version.pool.release()
    await asyncio.gather(*version.pool._opening.values())
    assert version.pool.size == 2
    assert [await ask(version, UNSEEN) for _ in range(8)] == [answer_of(1, UNSEEN)] * 8
    assert quarantine() == 1


@pytest.mark.promise("P2", "P6")
@pytest.mark.parametrize("reload", ["overlap", "replace"])
async def test_a_version_is_reloaded_from_the_registered_bytes(
    loader: Loader, loaded: Callable[..., Any], registry: ms.Registry, damage: Callable[..., Path], reload: Any
) -> None:
    """A second load in the same process does not believe the first."""
    version = await loaded()
    damage(1, UNSEEN)
    options = ModelOptions(allow_pickle=True, reload=reload)
    again = await loader.load(registry.get("m", "1"), options, beside=version)
    assert await ask(again, UNSEEN) == answer_of(1, UNSEEN)
    await again.unload()


# -- while it is loaded ------------------------------------------------------------------------------------


@pytest.mark.promise("P2", "P6")
@pytest.mark.parametrize("moment", ["before it is read", "after it is read", "only while it is read"])
async def test_damage_between_the_hash_and_the_load_drops_the_replica(
    loader: Loader,
    registry: ms.Registry,
    damage: Callable[..., Path],
    quarantine: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """What may have read other bytes never answers; the next try has the registered ones."""
    from modelserve.adapters.frameworks.sklearn import SklearnFramework  # noqa: PLC0415  # patched for this test alone

    load = SklearnFramework.load

    def disturbed(self: SklearnFramework, path: Path, *args: Any) -> Any:
        data = path.read_bytes()
        try:
            if not moment.startswith("after"):
                damage(1, UNSEEN)
            return load(self, path, *args)
        finally:
            if moment.startswith("after"):
                damage(1, UNSEEN)
            elif moment.startswith("only"):
                path.write_bytes(data)

    with monkeypatch.context() as patch, pytest.raises(ArtifactCorrupt):
        patch.setattr(SklearnFramework, "load", disturbed)
        await loader.load(registry.get("m", "1"), OPTIONS)
    version = await loader.load(registry.get("m", "1"), OPTIONS)
    assert await ask(version, UNSEEN) == answer_of(1, UNSEEN)
    assert quarantine() == (moment != "only while it is read")
    await version.unload()


# -- the provision by itself -------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    """A local store that counts what is read."""
    return CountingStore(str(tmp_path / "store"))


@pytest.fixture
def folder_of_model(store: CountingStore, tmp_path: Path) -> Artifact:
    """An artifact of several files."""
    return store.put(model_folder(tmp_path), format="saved_model")


@pytest.fixture
async def provision(store: CountingStore, tmp_path: Path, folder_of_model: Artifact) -> AsyncIterator[Provision]:
    """Provide that artifact."""
    cache = DiskCache(tmp_path / "cache")

    async def fetch() -> Lease:
        return await asyncio.to_thread(cache.fetch, store, folder_of_model)

    provision = Provision(folder_of_model, await fetch(), fetch)
    yield provision
    provision.close()
    assert +cache._of_this_process()._leases == {}


@pytest.mark.promise("P6")
@pytest.mark.parametrize("name", ["saved_model.pb", "variables/data"])
@pytest.mark.parametrize("change", ["in place", "replaced", "removed", "planted"])
async def test_every_file_of_a_folder_is_looked_at(provision: Provision, name: str, change: str) -> None:
    """Whatever happens to one of several files during a start ends it, and the next start has them all."""

    def disturb(path: Path) -> None:
        data = path.read_bytes()
        if change == "in place":
            path.chmod(0o644)
            path.write_bytes(b"!" + data[1:])
        elif change == "planted":
            (path.parent / "planted.py").touch()
        else:
            path.unlink()
            if change == "replaced":
                path.write_bytes(data)

    async def start() -> None:
        async with provision.intact():
            disturb(provision.path / name)

    with pytest.raises(ArtifactCorrupt, match="changed while a replica loaded"):
        await start()
    async with provision.intact():
        assert (provision.path / "saved_model.pb").read_bytes() == b"graph"
        assert (provision.path / "variables" / "data").read_bytes() == b"weights" * 1000


async def test_starts_at_once_share_a_hash_off_the_event_loop(
    provision: Provision, folder_of_model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen replicas cost what one does, before the load and after it; no hash is from before it was asked for."""
    hashes: list[threading.Thread] = []
    digest_of = files.digest_of

    def counted(pieces: Iterable[bytes]) -> tuple[str, int]:
        hashes.append(threading.current_thread())
        return digest_of(pieces)

    monkeypatch.setattr(files, "digest_of", counted)
    barrier = asyncio.Barrier(16)

    async def start() -> None:
        async with provision.intact():
            await barrier.wait()

    await asyncio.gather(*(start() for _ in range(16)))
    assert len(hashes) == 2 * 4  # a manifest and three files, twice
    assert threading.main_thread() not in hashes
    hashes.clear()
    async with provision.intact():
        pass
    assert len(hashes) == 2 * 4


async def test_a_check_that_fails_or_is_cancelled_is_not_believed(store: CountingStore, tmp_path: Path) -> None:
    """Those who wait behind it have one of their own."""
    cache, artifact = DiskCache(tmp_path / "cache"), store.put_bytes(b"hello", format="raw")
    outcomes, begun = iter(("hangs", "fails", "ends")), asyncio.Event()

    async def fetch() -> Lease:
        outcome = next(outcomes)
        begun.set()
        if outcome == "hangs":
            await asyncio.Event().wait()
        if outcome == "fails":
            raise BackendUnavailable("artifact store", "away")
        return cache.fetch(store, artifact)

    provision = Provision(artifact, cache.fetch(store, artifact), fetch)
    hanging, failing, good = (asyncio.create_task(provision.check()) for _ in range(3))
    await begun.wait()
    hanging.cancel()
    outcomes_of = await asyncio.gather(hanging, failing, good, return_exceptions=True)
    assert [type(each) for each in outcomes_of] == [asyncio.CancelledError, BackendUnavailable, Lease]
    provision.close()
