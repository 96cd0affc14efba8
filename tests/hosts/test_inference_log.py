"""The inference log of real servers on real databases: what was answered is there, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

import modelserve as ms
from modelserve.events import Served
from modelserve.monitor.log.writer import FLUSH_S
from modelserve.testing.models import tells, telltale
from tests import servers

X = np.array([[1.0], [2.0]])
EVERYTHING = {"m": ms.ModelOptions(log_sample_rate=1.0)}


def register(registry: ms.Registry) -> None:
    """Put version 1 of ``m`` into production, with a version 2 beside it."""
    for version in (1, 2):
        registry.register("m", str(version), telltale(version), example=X)
    registry.promote("m", "1")


def rows(registry: ms.Registry, *columns: str) -> list[tuple[Any, ...]]:
    """Return everything that was logged."""
    batches = registry.inference_log().read("m", columns=columns, batch_rows=500)
    return [row for batch in batches for row in zip(*(batch[name] for name in columns), strict=True)]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ms.Registry]:
    """A registry with the model, on each kind of database."""
    url = f"sqlite:///{tmp_path}/models.db"
    if request.param == "postgresql":
        url = str(request.getfixturevalue("postgres_url"))
    with ms.Registry(url, artifacts=str(tmp_path / "artifacts")) as registry:
        register(registry)
        yield registry


@pytest.mark.promise("P3")
async def test_every_answer_is_logged_as_it_was_given(registry: ms.Registry, tmp_path: Path, no_blocking: None) -> None:
    """By default the log lies beside the registry. Each row has its own input and answer, failures too."""
    async with ms.AsyncModelServer(registry, EVERYTHING, cache_dir=tmp_path / "cache") as server:
        await asyncio.gather(*(server.predict("m", {"x": [float(i)]}, request_id=f"r{i}") for i in range(300)))
        await server.predict_many("m", [{"x": [float(i)]} for i in range(300, 600)], request_id="many")
        with pytest.raises(ms.InvalidInput):
            await server.predict("m", {"x": ["five"]}, request_id="bad")
        status = server.log_status
    assert status is not None
    assert status.sampled == 601

    columns = ("request_id", "row_index", "inputs", "prediction", "version", "error", "input_hash")
    logged = await asyncio.to_thread(rows, registry, *columns)

    assert len(logged) == 601
    (failure,) = [row for row in logged if row[5] is not None]
    assert failure[0] == "bad"
    assert failure[5].startswith("InvalidInput: x: element [0]: expected float64")
    good = [row for row in logged if row[5] is None]
    assert {tells(answer, inputs["x"][0]) for _, _, inputs, answer, *_ in good} == {1}
    assert {row[4] for row in good} == {"1"}
    assert all(inputs["x"] == [300.0 + index] for request, index, inputs, *_ in good if request == "many")
    assert all(inputs["x"] == [float(request[1:])] for request, _, inputs, *_ in good if request != "many")
    assert len({row[6] for row in good}) == 600


async def test_what_is_off_is_not_there(registry: ms.Registry, tmp_path: Path) -> None:
    """Without log and metrics nobody observes a request; a rate of 0 everywhere is the same as no log."""
    off = {"m": ms.ModelOptions(log_sample_rate=0)}
    for options in ({"log": False}, {"models": off}):
        async with ms.AsyncModelServer(registry, cache_dir=tmp_path / "cache", metrics=False, **options) as server:
            assert not server._observers
            assert server.log_status is None
            assert await server.metrics() is None
            await server.predict("m", {"x": [1.0]})
    assert await asyncio.to_thread(rows, registry, "id") == []


def test_a_log_of_its_own_by_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and the environment say where the log is, that inputs are not kept, and the key of their hashes."""
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        register(registry)
    path = tmp_path / "modelserve.toml"
    path.write_text(
        f'registry = "sqlite:///{tmp_path}/models.db"\ncache_dir = "{tmp_path}/cache"\nlog = "sqlite:///{tmp_path}/log.db"\n'
        "[models.m]\nlog_sample_rate = 1.0\nlog_inputs = false\n",
        encoding="utf-8",
    )
    hashes = []
    for key in ("0123456789abcdef", "fedcba9876543210"):
        monkeypatch.setenv("MODELSERVE_LOG_KEY", key)
        assert key not in repr(ms.Settings.load(path))
        with ms.ModelServer.from_config(path) as server:
            server.predict("m", {"x": [5.0]})
        with ms.Registry(f"sqlite:///{tmp_path}/log.db") as registry:
            logged = rows(registry, "inputs", "input_hash")
        assert [row[0] for row in logged] == [None] * len(logged)
        hashes = [row[1] for row in logged]
    assert len(set(hashes)) == 2
    monkeypatch.setenv("MODELSERVE_LOG", "false")
    with ms.ModelServer.from_config(path) as server:
        assert server.log_status is None


@pytest.mark.promise("P3")
@pytest.mark.postgres
@pytest.mark.timeout(120)
def test_a_database_that_dies_under_load(own_postgres: servers.PostgresServer, tmp_path: Path) -> None:
    """It is killed and comes back while requests go on: none fails, and everything that was sampled is there, once."""
    url = own_postgres.url(own_postgres.create_database())
    with ms.Registry(url, str(tmp_path / "artifacts")) as registry:
        register(registry)
        answered = Counter[str]()
        with ms.ModelServer(registry, EVERYTHING, cache_dir=tmp_path / "cache") as server:
            stop = server.core.observe(
                lambda event: answered.update([event.request_id]) if isinstance(event, Served) else None
            )
            for at in range(3):
                for i in range(400):
                    server.predict("m", {"x": [float(i)]})
                if at == 0:
                    _until(lambda: _written(server) > 0)
                    own_postgres.crash()
                elif at == 1:
                    _until(lambda: _problem(server) is not None)
                    own_postgres.start()
            _until(lambda: _problem(server) is None)
            stop()
        logged = rows(registry, "request_id")
        assert len(answered) == 1200
        assert Counter(row[0] for row in logged) == answered


@pytest.mark.postgres
async def test_an_account_that_only_reads_serves_without_a_log(
    postgres_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody asked for a log, an account without the right to add to it serves as ever; the log says so once."""
    with ms.Registry(postgres_url, str(tmp_path / "artifacts")) as registry:
        register(registry)
    _execute(postgres_url, "DROP ROLE IF EXISTS looker")
    _execute(postgres_url, "CREATE ROLE looker LOGIN")
    _execute(postgres_url, "GRANT SELECT ON model_version, deployment, modelserve_alembic_version TO looker")
    try:
        looker = postgres_url.replace("postgres@", "looker@")
        with ms.Registry(looker, str(tmp_path / "artifacts")) as registry:
            async with ms.AsyncModelServer(registry, EVERYTHING, cache_dir=tmp_path / "cache", metrics=False) as server:
                await server.predict("m", {"x": [1.0]})
                await asyncio.to_thread(_until, lambda: not server._observers)
                await server.predict("m", {"x": [1.0]})
        with ms.Registry(postgres_url) as registry:
            assert rows(registry, "id") == []
    finally:
        _execute(postgres_url, "DROP OWNED BY looker")
        _execute(postgres_url, "DROP ROLE looker")
    told = [record.getMessage() for record in caplog.records if "inference log" in record.getMessage()]
    assert len(told) == 1
    assert "grant INSERT" in told[0]


KILLED = """
import time
import modelserve as ms
with ms.Registry("sqlite:///models.db") as registry:
    options = {"m": ms.ModelOptions(log_sample_rate=1.0)}
    with ms.ModelServer(registry, options, cache_dir="cache") as server:
        while True:
            print(server.predict("m", {"x": [1.0]}).request_id, time.time(), flush=True)
            time.sleep(0.001)
"""


@pytest.mark.promise("P3")
def test_a_process_that_is_killed_loses_no_more_than_was_told(tmp_path: Path) -> None:
    """After a SIGKILL all answers are in the log but those of the last second and the time of one write."""
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        register(registry)
        environment = os.environ | {"PYTHONPATH": str(Path(ms.__file__).parents[1])}
        command = [sys.executable, "-c", KILLED]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as host:
            assert host.stdout is not None
            answered = []
            for line in host.stdout:
                answered.append(line.split())
                if float(answered[-1][1]) - float(answered[0][1]) > 5.0:
                    break
            host.kill()
            killed_at = time.time()
            answered += [line.split() for line in host.stdout if line.endswith("\n")]
        logged = {row[0] for row in rows(registry, "request_id")}
    lost = [float(at) for request_id, at in answered if request_id not in logged]
    assert logged
    assert (
        min(lost, default=killed_at) > killed_at - FLUSH_S - 2.5
    )  # for a write on a machine that may halt for a second


def _execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def _written(server: ms.ModelServer) -> int:
    return server.log_status.written if server.log_status is not None else 0


def _problem(server: ms.ModelServer) -> str | None:
    return server.log_status.problem if server.log_status is not None else None


def _until(condition: Any) -> None:
    give_up = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)
