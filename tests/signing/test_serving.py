"""Servers that load only what somebody they trust has signed."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelserve as ms
from modelserve.artifacts import DiskCache
from modelserve.errors import ArtifactCorrupt, ArtifactUnsafe
from modelserve.events import LoadRejected
from modelserve.serving.loader import Loader
from modelserve.signing import generate_keys, trusted_keys
from modelserve.testing.models import tells, telltale

X = np.array([[1.0], [2.0]])
PAIR, NEXT = generate_keys(), generate_keys()


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """A registry with a signed version in production and an unsigned one in staging."""
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db")
    registry.register("m", "1", telltale(1), example=X, signing_key=PAIR.private)
    registry.register("m", "2", telltale(2), example=X)
    registry.promote("m", "1")
    return registry


@pytest.fixture
def loader(registry: ms.Registry, tmp_path: Path) -> Iterator[Loader]:
    """A loader that trusts one key, on an empty cache."""
    with ThreadPoolExecutor(2) as threads:
        cache = DiskCache(tmp_path / "cache")
        yield Loader(registry.artifacts, cache, threads, trusted_keys=trusted_keys([PAIR.public]))


def cached(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").rglob("*") if path.is_file()]


def overwrite(folder: Path, **columns: Any) -> None:
    """Write to the row of version 1 as somebody would who has the database, and nothing else."""
    with sqlite3.connect(folder / "models.db") as connection:
        for name, value in columns.items():
            connection.execute(f"UPDATE model_version SET {name} = ? WHERE version = '1'", (value,))  # noqa: S608  # our own names
    connection.close()


async def until(condition: Callable[[], bool], server: ms.AsyncModelServer) -> None:
    """Wait for the next events of a server until the condition holds."""
    changed = asyncio.Event()
    stop = server.observe(lambda _: changed.set())
    while not condition():
        changed.clear()
        await asyncio.wait_for(changed.wait(), 20)
    stop()


async def answers_of(server: ms.AsyncModelServer) -> int:
    return tells((await server.predict("m", {"x": [3.0]})).prediction, 3)


# -- loading -----------------------------------------------------------------------------------------------


@pytest.mark.promise("P8")
async def test_an_unsigned_version_is_refused_before_anything_is_fetched(
    loader: Loader, registry: ms.Registry, tmp_path: Path
) -> None:
    """Not a byte of it is downloaded, and its signature of inputs is not read."""
    with pytest.raises(ArtifactUnsafe, match="m 2 is not signed"):
        await loader.load(registry.get("m", "2"), ms.ModelOptions())
    assert cached(tmp_path) == []
    loaded = await loader.load(registry.get("m", "1"), ms.ModelOptions())
    await loaded.unload()
    assert cached(tmp_path) != []


@pytest.mark.promise("P8")
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("model_name", "n"),
        ("version", "2b"),
        ("framework", "onnx"),
        ("artifact_s3_key", "blobs/sha256/" + "0" * 64),
        ("artifact_sha256", "0" * 64),
        ("artifact_bytes", 10**12),
        ("artifact_format", "joblib"),
        ("signature", json.dumps({"inputs": [{"name": "y", "dtype": "float64", "shape": [], "nullable": False}]})),
        ("load_options", json.dumps({"method": "predict", "trusted": ["os.system"]})),
        ("example_s3_key", None),
        ("example_sha256", "0" * 64),
        ("example_bytes", 1),
    ],
)
async def test_a_row_that_was_written_past_the_registry_is_refused(
    loader: Loader, registry: ms.Registry, tmp_path: Path, column: str, value: Any
) -> None:
    """Each column that decides what is loaded is pinned by the signature; nothing is fetched for a changed one."""
    overwrite(tmp_path, **{column: value})
    name = {"model_name": "m", "version": "1", column: value}
    with pytest.raises(ArtifactUnsafe, match="is not what was signed"):
        await loader.load(registry.get(name["model_name"], name["version"]), ms.ModelOptions())
    assert cached(tmp_path) == []


@pytest.mark.promise("P6")
@pytest.mark.parametrize("part", ["artifact", "example"])
async def test_bytes_that_changed_under_a_signature_are_caught_by_their_digest(
    loader: Loader, registry: ms.Registry, tmp_path: Path, part: str
) -> None:
    """The signature pins the digest, and the digest the bytes: of the model and of its golden example."""
    version = registry.get("m", "1")
    blob = tmp_path / "artifacts" / getattr(version, part).key
    blob.chmod(0o644)
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    with pytest.raises(ArtifactCorrupt):
        await loader.load(version, ms.ModelOptions())


async def test_a_model_can_be_excepted(loader: Loader, registry: ms.Registry) -> None:
    """While models are signed one after the other, a server can go on with those that are not yet."""
    loaded = await loader.load(registry.get("m", "2"), ms.ModelOptions(require_signature=False))
    await loaded.unload()


async def test_a_signature_is_no_consent_to_run_code(loader: Loader, registry: ms.Registry) -> None:
    """Who signed a pickle said where it comes from; whether pickles are opened is still the server's choice."""
    pickled = registry.register("m", "3", telltale(3), example=X, format="joblib", signing_key=PAIR.private)
    with pytest.raises(ArtifactUnsafe, match="allow_pickle"):
        await loader.load(pickled, ms.ModelOptions())


# -- serving -----------------------------------------------------------------------------------------------


@pytest.mark.promise("P8")
async def test_the_old_version_serves_on_until_the_new_one_is_signed(registry: ms.Registry, tmp_path: Path) -> None:
    """An unsigned version that is promoted is refused and told; once it is signed it takes over at once."""
    refusals: list[LoadRejected] = []
    server = ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", poll_s=3600, trusted_keys=[PAIR.public])
    server.observe(lambda event: refusals.append(event) if isinstance(event, LoadRejected) else None)
    async with server:
        assert await answers_of(server) == 1
        registry.promote("m", "2")
        await until(lambda: bool(refusals), server)
        assert isinstance(refusals[0].error, ArtifactUnsafe)
        assert "m 2 is not signed" in str(server.status()[0].problem)
        assert await answers_of(server) == 1
        assert server.ready
        registry.sign("m", "2", PAIR.private)
        await until(lambda: server.status()[0].production == "2", server)
        assert await answers_of(server) == 2
        assert server.status()[0].problem is None


async def test_servers_exchange_keys_without_a_gap(registry: ms.Registry, tmp_path: Path) -> None:
    """A server that trusts both keys serves what either signed; one that trusts the new one serves what that signed."""
    registry.sign("m", "2", NEXT.private)
    registry.promote("m", "2")
    trusted: list[list[str]] = [[PAIR.public, NEXT.public], [NEXT.public]]
    for keys in trusted:
        async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", trusted_keys=keys) as server:
            assert await answers_of(server) == 2
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", trusted_keys=[PAIR.public]) as server:
        assert "signed by keys that are not trusted here" in str(server.status()[0].problem)


def test_a_required_signature_needs_a_trusted_key(registry: ms.Registry) -> None:
    """A server that could verify nothing is not built; neither is one whose key cannot be read."""
    strict = {"m": ms.ModelOptions(require_signature=True)}
    for kind in (ms.AsyncModelServer, ms.ModelServer):
        with pytest.raises(ms.ConfigError, match=r"models\.m\.require_signature: .*trusted_keys="):
            kind(registry, strict)
        with pytest.raises(ms.ConfigError, match=r"trusted_keys\[0\]"):
            kind(registry, strict, trusted_keys=["nowhere.pem"])
        kind(registry, strict, trusted_keys=[PAIR.public])


def test_a_server_with_trusted_keys_is_built_from_one_file(tmp_path: Path, registry: ms.Registry) -> None:
    """Keys are named in the file by their paths, or given as PEM text; without an option every model is verified."""
    (tmp_path / "public.pem").write_text(PAIR.public)
    config = tmp_path / "modelserve.toml"
    places = f'registry = "sqlite:///{tmp_path}/models.db"\ncache_dir = "{tmp_path}/cache"\n'
    config.write_text(f'{places}trusted_keys = ["{tmp_path}/public.pem"]\n')
    with ms.ModelServer.from_config(config) as server:
        assert tells(server.predict("m", {"x": [3.0]}).prediction, 3) == 1
    with ms.ModelServer.from_config(config, trusted_keys=[NEXT.public]) as server, pytest.raises(ms.NotReady):
        server.predict("m", {"x": [3.0]})
    config.write_text(f"{places}[models.m]\nrequire_signature = true\n")
    with pytest.raises(ms.ConfigError, match="trusted_keys="):
        ms.ModelServer.from_config(config)
