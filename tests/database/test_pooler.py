"""The registry behind a real PgBouncer in transaction mode: each transaction may get another connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

import modelserve as ms
from modelserve.adapters.changes import postgres
from modelserve.database.engine import Database
from modelserve.registry import Registry
from modelserve.testing.changes import Heard
from modelserve.testing.models import telltale
from tests import servers
from tests.registries import Insert
from tests.stores.test_inference_log import ids, record

X = np.array([[1.0], [2.0]])


def direct(url: str, pooler: servers.PgBouncer, postgres: servers.PostgresServer) -> str:
    """Return the URL of the server itself."""
    return url.replace(f":{pooler.port}/", f":{postgres.port}/")


@pytest.mark.promise("P4")
def test_promotions_and_polls_at_once_all_succeed(pooled_url: str, insert: Insert) -> None:
    """15 promotions, 200 polls and 60 writes to the log by 12 threads over 3 connections: none fails."""
    with Registry(pooled_url) as registry, ThreadPoolExecutor(12) as threads:
        for number in range(5):
            insert(registry, "churn", str(number))
        log = registry.inference_log()
        promotions = [threads.submit(registry.promote, "churn", str(i % 5)) for i in range(15)]
        asked: list[Callable[[], Any]] = [registry.pointers, registry.deployments]
        polls = [threads.submit(asked[i % 2]) for i in range(200)]
        writes = [threads.submit(log.append, [record(i)]) for i in range(60)]
        assert {each.result().version for each in promotions} == {"0", "1", "2", "3", "4"}
        assert all("churn" in each.result() for each in polls)
        assert [each.result() for each in writes] == [None] * 60
        assert len(ids(log)) == 60
        assert registry.rollback("churn").status == "production"


def test_first_use_by_many_makes_the_tables_once(pooled_url: str) -> None:
    """The lock of the migrations lasts as long as their transaction, which keeps its connection."""

    def first_use(_: int) -> dict[str, int]:
        with Registry(pooled_url) as registry:
            return registry.generations()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(first_use, range(8))) == [{}] * 8


async def test_a_server_behind_it_loads_follows_logs_and_counts(pooled_url: str, tmp_path: Path) -> None:
    """All that a server does with its database works, with a registry of its own for whoever promotes."""
    training = Registry(pooled_url, artifacts=str(tmp_path / "artifacts"))
    for number in (1, 2):
        await asyncio.to_thread(training.register, "m", str(number), telltale(number), example=X)
    await asyncio.to_thread(training.promote, "m", "1")
    serving = Registry(pooled_url, artifacts=str(tmp_path / "artifacts"))
    options = {"m": ms.ModelOptions(log_sample_rate=1.0)}
    async with ms.AsyncModelServer(serving, options, cache_dir=tmp_path / "cache", poll_s=0.02) as server:
        for wanted in ("2", "1", "2"):
            await asyncio.to_thread(training.promote, "m", wanted)
            async with asyncio.timeout(20):
                while (await server.predict("m", {"x": [3.0]})).model_version != wanted:  # noqa: ASYNC110  # a poll finds it
                    await asyncio.sleep(0.01)
        assert b"modelserve_model_ready" in (await server.metrics() or b"")
        assert [each.version for each in await server.versions("m")] == ["2", "1"]
    assert len(ids(training.inference_log())) >= 3
    await asyncio.to_thread(training.close)
    await asyncio.to_thread(serving.close)


def test_listening_behind_it_says_what_to_do(
    pooled_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would ever be heard there: one warning says so and names the way out, however often it is tried again."""
    monkeypatch.setattr(postgres, "_CHECK_S", 0.2)
    tries = queue.SimpleQueue[int]()

    def pause(failures: int) -> float:
        tries.put(failures)
        return 0.0

    with Registry(pooled_url) as registry, contextlib.closing(registry.change_hints("postgres")) as hints:
        hints._feed._pause = pause  # type: ignore[attr-defined]
        heard = Heard()
        hints.subscribe(heard)
        while tries.get(timeout=20) < 3:
            pass
    assert heard.names == []
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "pooler" in warnings[0]
    assert "changes='postgresql://user@host/database'" in warnings[0]


def test_changes_are_heard_on_a_direct_connection(
    pooled_url: str, pgbouncer_server: servers.PgBouncer, postgres_server: servers.PostgresServer, insert: Insert
) -> None:
    """A registry behind the pooler notifies; a URL of the server itself, psycopg's own option in it, hears it."""
    url = direct(pooled_url, pgbouncer_server, postgres_server) + "?prepare_threshold=5&connect_timeout=7"
    with Registry(pooled_url) as registry, contextlib.closing(registry.change_hints(url)) as hints:
        heard = Heard()
        hints.subscribe(heard)
        heard.until(None)
        insert(registry, "churn", "1")
        heard.until("churn")


def test_changes_are_heard_through_a_pooler_of_sessions(
    postgres_server: servers.PostgresServer, pooled_url: str, insert: Insert
) -> None:
    """One that leaves a client its connection is no obstacle."""
    with servers.pgbouncer(postgres_server, connections=5, mode="session") as sessions:
        url = sessions.url(pooled_url.rpartition("/")[2])
        with Registry(pooled_url) as registry, contextlib.closing(registry.change_hints(url)) as hints:
            heard = Heard()
            hints.subscribe(heard)
            heard.until(None)
            insert(registry, "churn", "1")
            heard.until("churn")


def test_statements_are_prepared_only_if_asked_for(postgres_url: str) -> None:
    """``prepare_threshold`` in the URL is psycopg's; without it there is none, and other options are as ever."""
    for option, wanted in (("", 0), ("?prepare_threshold=none", 0), ("?prepare_threshold=0&application_name=mine", 1)):
        with contextlib.closing(Database(postgres_url + option)) as database:
            for _ in range(8):
                with database.read() as connection:
                    connection.execute(sa.text("SELECT 1"))
            with database.read() as connection:
                prepared = connection.scalar(sa.text("SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql"))
                name = connection.scalar(sa.text("SELECT current_setting('application_name')"))
        assert min(prepared or 0, 1) == wanted
        assert name == ("mine" if "mine" in option else "")
