"""A version is promoted while the object store misbehaves: the old one serves, the new one comes by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import modelserve as ms
from modelserve.artifacts import ArtifactStore
from modelserve.events import LoadRejected, VersionLoaded
from modelserve.testing.models import tells, telltale
from tests.faulty_s3 import FOREVER, FaultyS3

pytestmark = pytest.mark.aws


@pytest.fixture
def registry(faulty_s3: FaultyS3, tmp_path: Path) -> ms.Registry:
    """A registry with two versions of the model ``m`` on S3 behind the proxy, the first in production."""
    store = ArtifactStore(faulty_s3.artifacts.url, **faulty_s3.artifacts.storage_options)
    registry = ms.Registry(f"sqlite:///{tmp_path}/models.db", store)
    for number in (1, 2):
        registry.register("m", str(number), telltale(number), example=np.array([[1.0], [2.0]]))
    registry.promote("m", "1")
    return registry


@pytest.mark.promise("P6")
@pytest.mark.parametrize(
    ("fault", "requests", "said"),
    [
        ("503", 5, "503 SlowDown"),
        ("reset", 5, "5 times in a row"),
        ("stalled", 5, "nothing arrived in time"),
        ("truncated", 5, "the connection broke"),
        ("flipped", 2, "expected SHA-256"),
        ("403", 1, "403 AccessDenied"),
        ("404", 1, "the artifact store has no"),
    ],
)
async def test_the_version_before_serves_until_the_store_is_well(
    registry: ms.Registry, faulty_s3: FaultyS3, tmp_path: Path, no_pauses: None, fault: str, requests: int, said: str
) -> None:
    """While the new version cannot be had, each answer is of the old one; once it can, nobody has to do anything."""
    async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache") as server:
        faulty_s3.gets.clear()
        faulty_s3.do(fault, times=FOREVER, after=100)
        refused, loaded = asyncio.Event(), asyncio.Event()

        def observe(event: object) -> None:
            if isinstance(event, LoadRejected):
                refused.set()
            elif isinstance(event, VersionLoaded):
                loaded.set()

        server.observe(observe)
        registry.promote("m", "2")
        await _answering(server, "1", refused.is_set)
        problem = server.status()[0].problem
        assert problem is not None
        assert said in problem
        assert len(faulty_s3.gets) == requests
        faulty_s3.heal()
        await _answering(server, None, loaded.is_set)
        assert (await server.predict("m", {"x": [3.0]})).model_version == "2"
        assert len(faulty_s3.gets) <= 2 * requests + 2
    registry.close()


async def _answering(server: ms.AsyncModelServer, version: str | None, done: Callable[[], bool]) -> None:
    """Ask all the time, until it is done; every answer is its version's own."""
    async with asyncio.timeout(30):
        while not done():
            answer = await server.predict("m", {"x": [3.0]})
            assert str(tells(answer.prediction, 3.0)) == answer.model_version
            assert version in {None, answer.model_version}
            await asyncio.sleep(0.01)
