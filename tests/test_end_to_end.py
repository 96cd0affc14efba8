"""The main job on the real stores: PostgreSQL for the rows, an S3 protocol server for the bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

import modelserve as ms
from modelserve.artifacts import ArtifactStore
from modelserve.events import VersionLoaded
from modelserve.testing.models import tells, telltale
from tests.servers import S3Artifacts

X = np.array([[1.0], [2.0]])


async def test_register_serve_promote_and_roll_back_on_postgresql_and_s3(
    postgres_url: str, s3_artifacts_url: S3Artifacts, tmp_path: Path
) -> None:
    """Models registered in one place are served, replaced and rolled back in another, under load, without a failure."""
    store = ArtifactStore(s3_artifacts_url.url, **s3_artifacts_url.storage_options)
    with ms.Registry(postgres_url, artifacts=store) as training, ms.Registry(postgres_url, artifacts=store) as serving:
        await asyncio.to_thread(_register_two, training)
        async with ms.AsyncModelServer(serving, cache_dir=tmp_path / "cache", poll_s=0.05) as server:
            stop = asyncio.Event()
            callers = [asyncio.create_task(_call(server, float(i), stop)) for i in range(16)]
            for change, wanted in ((lambda: training.promote("m", "2"), "2"), (lambda: training.rollback("m"), "1")):
                await asyncio.to_thread(change)
                await _takes_over(server, wanted)
            stop.set()
            assert sum(await asyncio.gather(*callers)) > 100
    assert [event.action for event in training.history("m")][-2:] == ["promote", "rollback"]
    training.close()


async def _takes_over(server: ms.AsyncModelServer, version: str) -> None:
    changed = asyncio.Event()
    stop = server.observe(lambda event: changed.set() if isinstance(event, VersionLoaded) else None)
    async with asyncio.timeout(20):
        while server.status()[0].production != version:
            await changed.wait()
            changed.clear()
    stop()


def _register_two(registry: ms.Registry) -> None:
    for number in (1, 2):
        registry.register("m", str(number), telltale(number), example=X)
    registry.promote("m", "1")


async def _call(server: ms.AsyncModelServer, x: float, stop: asyncio.Event) -> int:
    calls = 0
    while not stop.is_set():
        answer = await server.predict("m", {"x": [x]})
        assert str(tells(answer.prediction, x)) == answer.model_version
        calls += 1
    return calls
