"""How long a server takes to start when its database is far away: 20 ms for every question, and many models.

320 models, with and without a list of them; 20 models among 20,000 names; and, read only, what is wanted of 20,000
models in production. Beside each are the questions that were sent, times 20 ms, and the same without the latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

import modelserve as ms
from benchmarks._common import Budget, arguments, machine, print_table, report
from modelserve.database.tables import deployment, model_version
from modelserve.testing.models import telltale
from tests import servers
from tests.tcp_proxy import TcpProxy, tcp_proxy

FAR_S: Final = 0.02
PATIENCE_S: Final = 60.0
MODELS: Final = 320
NAMES: Final = 20_000


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    models, names = (40, 2_000) if quick else (MODELS, NAMES)
    print(machine())
    with servers.postgres() as postgres:
        rows = [
            _start(postgres, f"{models} models, listed", models=models, names=models, listed=True),
            _start(postgres, f"{models} models, all there are", models=models, names=models, listed=False),
            _start(postgres, f"20 models of {names} names", models=20, names=names, listed=False),
            _read(postgres, f"{names} deployments, read only", names),
        ]
    print_table(f"starts behind {FAR_S * 1000:.0f} ms for each question to the database", rows)
    budgets = [Budget(f"{row['start']}: seconds", 10, row["s"], at_least=False) for row in rows]
    report("start", quick=quick, rows=rows, budgets=budgets)


def _start(postgres: servers.PostgresServer, title: str, *, models: int, names: int, listed: bool) -> dict[str, Any]:
    """Measure a start behind the latency, and one without any."""
    with tempfile.TemporaryDirectory() as folder, _filled(postgres, Path(folder), models, names) as (url, artifacts):
        options = {f"m{i}": ms.ModelOptions() for i in range(models)} if listed else None

        def start(at: str, cache: str) -> float:
            with ms.Registry(at, artifacts) as registry:
                return asyncio.run(_until_ready(registry, options, Path(folder) / cache, models))

        near = start(url, "near")
        with _far(postgres.port) as proxy:
            far = start(url.replace(str(postgres.port), str(proxy.port)), "far")
    return _row(title, far, proxy, near)


def _read(postgres: servers.PostgresServer, title: str, names: int) -> dict[str, Any]:
    """Measure how long it takes to read what is wanted of every name, when all have a version in production."""
    with tempfile.TemporaryDirectory() as folder, _filled(postgres, Path(folder), names, names) as (url, artifacts):
        with ms.Registry(url, artifacts) as registry:
            near = _seconds_to_read(registry, names)
        with _far(postgres.port) as proxy, ms.Registry(url.replace(str(postgres.port), str(proxy.port))) as registry:
            far = _seconds_to_read(registry, names)
    return _row(title, far, proxy, near)


def _seconds_to_read(registry: ms.Registry, names: int) -> float:
    begun = time.perf_counter()
    assert len(registry.deployments()) == names
    return time.perf_counter() - begun


def _row(title: str, far: float, proxy: TcpProxy, near: float) -> dict[str, Any]:
    bare = proxy.requests * FAR_S
    return {"start": title, "s": far, "questions": proxy.requests, "bare s": bare, "s without latency": near}


async def _until_ready(registry: ms.Registry, options: Any, cache: Path, models: int) -> float:
    """Return the seconds that a start takes; infinity when it has not returned, or not all is ready, in a minute."""
    server = ms.AsyncModelServer(registry, options, cache_dir=cache, log=False)
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await server.start()
        seconds = time.perf_counter() - begun
        return seconds if server.ready and len(server.status()) == models else math.inf
    except TimeoutError:
        return math.inf
    finally:
        await server.close()


@contextlib.contextmanager
def _filled(postgres: servers.PostgresServer, folder: Path, models: int, names: int) -> Iterator[tuple[str, str]]:
    """Make a registry of many names, of which the first few have a version in production: all with the same bytes."""
    url, artifacts = postgres.url(postgres.create_database()), str(folder / "artifacts")
    with ms.Registry(url, artifacts) as registry:
        registry.register("original", "1", telltale(1), example=np.array([[1.0]]))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        row = dict(connection.execute(sa.select(model_version)).mappings().one())
        now = row["created_at"]
        for table in (deployment, model_version):
            connection.execute(sa.delete(table))
        every = [(10 + i, f"m{i}", i < models) for i in range(names)]
        versions = [
            row | {"id": number, "model_name": name, "status": "production" if served else "staging"}
            for number, name, served in every
        ]
        connection.execute(sa.insert(model_version), versions)
        deployments = [
            {"model_name": name, "production_id": number if served else None, "generation": 2, "updated_at": now}
            for number, name, served in every
        ]
        connection.execute(sa.insert(deployment), deployments)
    engine.dispose()
    yield url, artifacts


@contextlib.contextmanager
def _far(port: int) -> Iterator[TcpProxy]:
    """Put the latency in front of a port, from a thread with a loop of its own: a start must not hold it up."""
    loop, ready, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[TcpProxy] = []

    async def serve() -> None:
        async with tcp_proxy(port) as proxy:
            proxy.away_s = FAR_S
            found.append(proxy)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


if __name__ == "__main__":
    main()
