"""Fixtures shared by every test: real servers, and a watch over the event loop."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings

from modelserve.artifacts import transfer
from modelserve.config import ModelOptions
from modelserve.serving.version import LoadedVersion
from tests import servers
from tests.faulty_s3 import FaultyS3, behind_a_proxy

settings.register_profile("modelserve", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("modelserve")

pytest_plugins = ["tests.registries"]

_MARK_OF_FIXTURE = {
    "own_postgres": "postgres",
    "own_redis": "redis",
    "postgres_server": "postgres",
    "redis_server": "redis",
    "s3_server": "aws",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the servers they use, so that ``-m "not postgres"`` cannot miss one."""
    for item in items:
        for fixture in _MARK_OF_FIXTURE.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(_MARK_OF_FIXTURE[fixture])


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give requests half a minute where no limit was set: a machine that halts for a second is no finding."""
    begin = LoadedVersion.__init__

    def patient(self: LoadedVersion, meta: Any, options: ModelOptions, *args: Any, **others: Any) -> None:
        begin(self, meta, options, *args, **others)
        if "timeout_ms" not in options.model_fields_set:
            self.timeout_s = 30.0

    monkeypatch.setattr(LoadedVersion, "__init__", patient)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[servers.PostgresServer]:
    """One real PostgreSQL server for the run."""
    try:
        with servers.postgres() as server:
            yield server
    except servers.ServerMissing as missing:
        servers.unavailable(str(missing))


@pytest.fixture
def own_postgres() -> Iterator[servers.PostgresServer]:
    """A PostgreSQL server that the test may hurt."""
    try:
        with servers.postgres() as server:
            yield server
    except servers.ServerMissing as missing:
        servers.unavailable(str(missing))


@pytest.fixture
def own_redis() -> Iterator[servers.RedisServer]:
    """A Redis server that the test may hurt."""
    try:
        with servers.redis() as server:
            yield server
    except servers.ServerMissing as missing:
        servers.unavailable(str(missing))


@pytest.fixture(scope="session")
def pgbouncer_server(postgres_server: servers.PostgresServer) -> Iterator[servers.PgBouncer]:
    """One real PgBouncer in transaction mode, with few connections, in front of the PostgreSQL server."""
    try:
        with servers.pgbouncer(postgres_server, connections=3) as server:
            yield server
    except servers.ServerMissing as missing:
        servers.unavailable(str(missing))


@pytest.fixture
def pooled_url(pgbouncer_server: servers.PgBouncer, postgres_server: servers.PostgresServer) -> Iterator[str]:
    """The URL of an empty database of the test's own, behind the pooler."""
    name = postgres_server.create_database()
    yield pgbouncer_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture
def postgres_url(postgres_server: servers.PostgresServer) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.RedisServer]:
    """One real Redis server for the run."""
    try:
        with servers.redis() as server:
            yield server
    except servers.ServerMissing as missing:
        servers.unavailable(str(missing))


@pytest.fixture
def redis_url(redis_server: servers.RedisServer) -> str:
    """The URL of the Redis server, with channels of the test's own."""
    return f"{redis_server.url}?prefix={uuid.uuid4().hex}:"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of one real S3 protocol server for the run."""
    try:
        with servers.s3() as endpoint:
            yield endpoint
    except ModuleNotFoundError as missing:
        servers.unavailable(f"no S3 server: {missing}; pip install 'moto[s3,server]'")


@pytest.fixture
def s3_artifacts_url(s3_server: str) -> servers.S3Artifacts:
    """An artifact root in a fresh bucket."""
    return servers.create_bucket(s3_server)


@pytest.fixture
def faulty_s3(s3_server: str) -> Iterator[FaultyS3]:
    """A proxy in front of the S3 server, with an artifact root in a fresh bucket behind it."""
    with behind_a_proxy(servers.create_bucket(s3_server), s3_server) as faulty:
        yield faulty


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pauses between the attempts of a download take no time."""
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.0)


@pytest.fixture
def no_blocking() -> Iterator[None]:
    """Fail the test when code of modelserve blocks the event loop."""
    with blockbuster_ctx("modelserve"):
        yield
