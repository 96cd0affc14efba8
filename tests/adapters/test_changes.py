"""What tells of changes, in one process, over PostgreSQL and over Redis: the contract and the rest of it."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis as redis_py

from modelserve import plugins
from modelserve.adapters.changes.postgres import PostgresChanges
from modelserve.adapters.changes.redis import RedisChanges
from modelserve.errors import BackendUnavailable, ConfigError, MissingDependency
from modelserve.ports import ChangeHints, ChangePublisher
from modelserve.registry import Registry
from modelserve.registry.hints import Hints
from modelserve.server import AsyncModelServer
from modelserve.testing.changes import ChangeHintsContract, ConnectedHintsContract, Heard
from tests import servers
from tests.registries import ARTIFACT


def add(registry: Registry, model_name: str, version: str = "") -> None:
    """Change a model: add a version that nobody will load, ``version`` or a new one."""
    registry._insert(
        model_name=model_name,
        version=version or f"{time.monotonic_ns()}",
        framework="sklearn",
        artifact=ARTIFACT,
        signature={"inputs": []},
        load_options={},
        example=None,
        conversion=None,
        metrics={},
        tags={},
        actor="tester",
        reason="",
    )


class TestInProcess(ChangeHintsContract):
    @pytest.fixture
    def hints(self) -> Hints:
        return Hints()

    @pytest.fixture
    def change(self, hints: Hints) -> Callable[[str], None]:
        return hints.publish


class TestPostgres(ConnectedHintsContract):
    @pytest.fixture
    def hints(self, postgres_url: str) -> Iterator[ChangeHints]:
        with Registry(postgres_url) as registry:
            hints = registry.change_hints("postgres")
            yield hints
            hints.close()

    @pytest.fixture
    def change(self, postgres_url: str) -> Iterator[Callable[[str], None]]:
        """A registry of its own, which was told nothing of who listens."""
        with Registry(postgres_url) as elsewhere:
            yield functools.partial(add, elsewhere)

    @pytest.fixture
    def sever(self, postgres_url: str) -> Callable[[], None]:
        def sever() -> None:
            with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
                query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
                assert connection.execute(query, ["modelserve changes"]).fetchall() == [(True,)]

        return sever


class TestRedis(ConnectedHintsContract):
    @pytest.fixture
    def hints(self, redis_url: str) -> Iterator[ChangeHints]:
        hints = plugins.changes(redis_url)
        yield hints
        hints.close()

    @pytest.fixture
    def change(self, redis_url: str, tmp_path: Path) -> Iterator[Callable[[str], None]]:
        """A registry that publishes, on a database that cannot tell of changes itself."""
        with Registry(f"sqlite:///{tmp_path}/models.db", changes=redis_url) as elsewhere:
            yield functools.partial(add, elsewhere)

    @pytest.fixture
    def sever(self, redis_server: servers.RedisServer) -> Callable[[], None]:
        def sever() -> None:
            with redis_py.Redis(port=redis_server.port) as client:
                assert client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1

        return sever


# -- PostgreSQL --------------------------------------------------------------------------------------------


def test_a_change_that_is_rolled_back_is_not_told(postgres_url: str) -> None:
    """The notice is part of the transaction: without the commit nobody hears of it."""
    with Registry(postgres_url) as registry:
        add(registry, "churn", "1")
        hints, heard = registry.change_hints("postgres"), Heard()
        hints.subscribe(heard)
        heard.until(None)
        with pytest.raises(RuntimeError), registry._change("churn", "promote", "tester", "") as change:
            change.version = "1"
            change.save(action="promote", actor="tester", reason="", now=registry._time(change.connection))
            raise RuntimeError("before the commit")
        registry.promote("churn", "1")
        heard.until("churn")
        add(registry, "fraud", "1")
        heard.until("fraud")
        hints.close()
    assert heard.names == [None, "churn", "fraud"]


def test_databases_of_one_server_do_not_hear_each_other(
    postgres_server: servers.PostgresServer, postgres_url: str
) -> None:
    """A channel belongs to its database: a registry in another one is not told."""
    other = postgres_server.create_database()
    with Registry(postgres_url) as ours, Registry(postgres_server.url(other)) as theirs:
        hints, heard = ours.change_hints("postgres"), Heard()
        hints.subscribe(heard)
        heard.until(None)
        add(theirs, "theirs", "1")
        add(ours, "ours", "1")
        heard.until("ours")
        hints.close()
    postgres_server.drop_database(other)
    assert heard.names == [None, "ours"]


def test_postgres_hints_need_a_registry_in_postgres(tmp_path: Path) -> None:
    """On SQLite the option is refused with what else there is."""
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry, pytest.raises(ConfigError, match="redis://"):
        registry.change_hints("postgres")


def test_the_registrys_url_is_handed_on_whole() -> None:
    """Password, query and several hosts arrive as libpq reads them."""
    with Registry("postgresql://me:p%40ss%2F@/db?host=a:1&host=b:2&sslmode=require", artifacts="x") as registry:
        hints = registry.change_hints("postgres")
    assert isinstance(hints, PostgresChanges)
    expected = {"user": "me", "password": "p@ss/", "dbname": "db", "host": "a,b", "port": "1,2", "sslmode": "require"}
    assert hints._options.items() >= expected.items()


# -- Redis -------------------------------------------------------------------------------------------------


def test_prefixes_keep_registries_of_one_redis_apart(redis_server: servers.RedisServer) -> None:
    """A change is told under its own prefix only."""
    ours, theirs = RedisChanges(f"{redis_server.url}?prefix=ours:"), RedisChanges(f"{redis_server.url}?prefix=theirs:")
    heard = Heard()
    ours.subscribe(heard)
    heard.until(None)
    theirs.publish("theirs")
    ours.publish("ours")
    heard.until("ours")
    ours.close()
    theirs.close()
    assert heard.names == [None, "ours"]


def test_foreign_bytes_on_the_channel_hurt_nobody(redis_server: servers.RedisServer, redis_url: str) -> None:
    """What is not text becomes a name that no model has, and the next change is told as ever."""
    hints, heard = RedisChanges(redis_url), Heard()
    hints.subscribe(heard)
    heard.until(None)
    with redis_py.Redis(port=redis_server.port) as client:
        client.publish(hints._channel, b"\xff\x00")
    hints.publish("churn")
    heard.until("churn")
    hints.close()
    assert heard.names == [None, "�\x00", "churn"]


@pytest.mark.redis
@pytest.mark.parametrize("fault", ["stalled", "gone"])
def test_a_redis_that_is_down_does_not_hold_up_a_change(
    own_redis: servers.RedisServer,
    tmp_path: Path,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A change is made within half a second more than ever, also by twenty callers at once, and the log says so."""
    with Registry(f"sqlite:///{tmp_path}/models.db", changes=own_redis.url) as registry:
        add(registry, "churn", "0")
        own_redis.signal(signal.SIGSTOP) if fault == "stalled" else own_redis.kill()
        began = time.monotonic()
        add(registry, "churn", "1")
        assert time.monotonic() - began < 1.5
        callers = [threading.Thread(target=add, args=(registry, f"m{i}", "1")) for i in range(20)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(20)
        assert len(registry.models()) == 21
        own_redis.signal(signal.SIGCONT) if fault == "stalled" else own_redis.start()
    assert "left to be found by polling" in caplog.text
    assert str(own_redis.port) not in caplog.text


@pytest.mark.redis
def test_redis_gone_and_back_is_logged_once_each(
    own_redis: servers.RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """However many attempts it takes to connect again, the log has one line for the loss and one for the return."""
    hints, heard = RedisChanges(own_redis.url), Heard()
    tried = threading.Semaphore(0)

    def pause(failures: int) -> float:
        tried.release()
        return 0.01

    hints._feed._pause = pause
    with caplog.at_level(logging.INFO, logger="modelserve"):
        hints.subscribe(heard)
        heard.until(None)
        own_redis.kill()
        for _ in range(3):
            assert tried.acquire(timeout=20)
        with pytest.raises(BackendUnavailable, match="Redis is unavailable: no connection"):
            hints.ping()
        own_redis.start()
        heard.until(None)
        hints.close()
    told = [record.getMessage() for record in caplog.records if record.name == "modelserve"]
    assert len(told) == 2
    assert "no longer told by Redis" in told[0]
    assert "told by Redis again" in told[1]


# -- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "extra"), [("redis://localhost", "redis"), ("postgresql://localhost/models", "postgres")]
)
def test_a_missing_driver_answers_with_its_install_line(
    url: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked for without its driver, a carrier names the extra that brings it, when the server is built."""
    driver = "redis" if extra == "redis" else "psycopg"
    monkeypatch.setitem(__import__("sys").modules, driver, None)
    line = rf"pip install 'modelserve\[{extra}\]'"
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry, pytest.raises(MissingDependency, match=line):
        registry.change_hints(url)


@pytest.mark.parametrize(
    "url",
    ["kafka://host", "", "redis", "redis://host:notaport", "redis://host?nonsense=1", "postgresql://me:%secret@host/x"],
)
def test_a_url_that_cannot_be_read_is_a_config_error(url: str) -> None:
    """The error says how it is written, and quotes no secret."""
    with pytest.raises(ConfigError) as refused:
        plugins.changes(url)
    assert "secret" not in str(refused.value)
    assert "changes" in str(refused.value)


def test_nobody_there_is_a_typed_error() -> None:
    """A ping of what does not answer is ``BackendUnavailable``, without host or user in it."""
    port = servers.free_port()
    for url in (f"redis://someone@127.0.0.1:{port}", f"postgresql://someone@127.0.0.1:{port}/models"):
        with pytest.raises(BackendUnavailable) as refused:
            plugins.changes(url).ping()
        assert "someone" not in str(refused.value)


async def test_listening_does_not_block_the_event_loop(no_blocking: None, redis_url: str, tmp_path: Path) -> None:
    """An async server starts, hears of a change, closes and starts again without blocking its loop, threads gone."""
    registry = await asyncio.to_thread(Registry, f"sqlite:///{tmp_path}/models.db", changes=redis_url)
    await asyncio.to_thread(registry.upgrade)
    make = functools.partial(AsyncModelServer, registry, cache_dir=tmp_path / "cache", changes=redis_url)
    server = await asyncio.to_thread(make)  # imports the driver
    for _ in range(2):
        async with server:
            await asyncio.to_thread(add, registry, "churn")
        listening = [thread for thread in threading.enumerate() if thread.name.startswith("modelserve-changes")]
        assert listening == []
    await asyncio.to_thread(registry.close)


def test_who_publishes_says_so() -> None:
    """Redis has to be told of changes; PostgreSQL tells by itself."""
    assert isinstance(RedisChanges("redis://localhost"), ChangePublisher)
    assert not isinstance(PostgresChanges("postgresql://localhost/models"), ChangePublisher)
