"""Several host processes on one registry: all of them reach each generation, and nobody notices but by the version."""

from __future__ import annotations

import functools
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import modelserve as ms
from modelserve.events import VersionLoaded
from tests import servers
from tests.hosts.fleet import (
    MODEL,
    Answer,
    Change,
    allowed,
    change_at_random,
    converged,
    fleet,
    judge,
    register,
    requests,
)
from tests.hosts.test_hosts import eventually, web

pytestmark = pytest.mark.timeout(180)  # three processes that import scikit-learn, on however slow a machine
LIMIT_S = 50.0
LOAD_S = 5.0  # what loading a version may take beside everything else


def promote_by_command(url: str, artifacts: str, version: str, **environment: str) -> None:
    """Promote as an operator does, in a process of its own."""
    command = [sys.executable, "-m", "modelserve.cli", "--registry", url, "--artifacts", artifacts]
    subprocess.run([*command, "promote", MODEL, version], env=os.environ | environment, check=True, timeout=LIMIT_S)


# -- every kind of host ------------------------------------------------------------------------------------

HOST = """
import os, pathlib
import modelserve as ms
from modelserve.events import VersionLoaded
registry = ms.Registry("sqlite:///{folder}/models.db")
settings = dict(models={{"telltale": ms.ModelOptions()}}, cache_dir="{folder}/cache", poll_s=0.5)
def note(event):
    if isinstance(event, VersionLoaded):
        with pathlib.Path("{folder}", f"applied-{{os.getpid()}}").open("a") as file:
            print(event.generation, file=file)
"""
ASGI = """
server = ms.AsyncModelServer(registry, **settings)
server.observe(note)
app = ms.asgi(server)
"""
WSGI = """
server = ms.ModelServer(registry, **settings)
server.core.observe(note)
app = ms.wsgi(server)
"""
HOOKS = """
def post_worker_init(worker):
    from host import server
    server.start()

def worker_exit(_, worker):
    from host import server
    server.close()
"""


def all_applied(folder: Path, generation: int) -> bool:
    """Whether each of three worker processes applied this generation last."""
    applied = [path.read_text(encoding="utf-8").split() for path in folder.glob("applied-*")]
    return [each[-1] for each in applied if each] == [str(generation)] * 3


@pytest.mark.promise("P4")
@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_every_worker_of_a_web_server_follows(tmp_path: Path, kind: str) -> None:
    """A promotion by the command line reaches each of three workers, which know of each other nothing."""
    url = f"sqlite:///{tmp_path}/models.db"
    with ms.Registry(url) as registry:
        register(registry)
        generation = registry.generations()[MODEL]
    (tmp_path / "host.py").write_text(HOST.format(folder=tmp_path) + (ASGI if kind == "uvicorn" else WSGI))
    (tmp_path / "gunicorn.conf.py").write_text(HOOKS)
    command = {
        "uvicorn": ["uvicorn", "--workers", "3", "--port", "PORT", "host:app"],
        "gunicorn": ["gunicorn", "-w", "3", "-b", "127.0.0.1:PORT", "host:app"],
    }[kind]
    with web(tmp_path, command):
        eventually(functools.partial(all_applied, tmp_path, generation), "three workers do not start")
        for i, version in enumerate(("2", "3"), start=1):
            promote_by_command(url, str(tmp_path / "artifacts"), version)
            eventually(functools.partial(all_applied, tmp_path, generation + i), "not all follow")


@pytest.mark.promise("P2")
@pytest.mark.promise("P4")
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.parametrize("changes", ["postgres", "redis"])
def test_changes_at_random_under_load(postgres_url: str, redis_url: str, tmp_path: Path, changes: str) -> None:
    """Three hosts, 200 requests a second and 40 changes: none fails, each answer is right and was allowed.

    Afterwards a promotion by the command line reaches all of them, and each says so itself.
    """
    poll_s, artifacts = 0.5, str(tmp_path / "artifacts")
    changes = redis_url if changes == "redis" else changes
    settings = {"registry": postgres_url, "artifacts": artifacts, "changes": changes, "poll_s": poll_s}
    with ms.Registry(postgres_url, artifacts, changes=changes) as registry:
        register(registry)
        with fleet(3, tmp_path, **settings) as hosts:
            with requests(hosts, per_second=200) as answers:
                made = change_at_random(registry, 40, 0.1, random.Random(7))
                converged(registry, hosts)
            verdict = judge(answers, made, poll_s + LOAD_S)
            assert (verdict.failed, verdict.wrong, verdict.not_allowed) == (0, 0, 0)
            assert verdict.answers > 300
            assert len({answer.body["model_version"] for answer in answers if answer.body}) > 1
            other = "1" if registry.production(MODEL).version != "1" else "2"
            promote_by_command(postgres_url, artifacts, other, MODELSERVE_CHANGES=changes)
            converged(registry, hosts)


def test_the_judge_sees_what_is_wrong() -> None:
    """Failures, answers of another version, and versions that were out of production are each counted."""
    changes = [Change(1, 0, 0), Change(2, 10, 11), Change(3, 20, 21)]

    def answer(version: int, sent: float, *, says: int | None = None, status: int = 200) -> Answer:
        body = {"prediction": 5 + 1000 * version, "model_version": str(says or version)}
        return Answer(5.0, sent, sent + 0.1, status, body)

    assert allowed(answer(1, 11.5), changes, 1)
    assert not allowed(answer(1, 12.5), changes, 1)
    assert not allowed(answer(2, 9), changes, 1)
    assert allowed(answer(2, 10.5), changes, 0)
    verdict = judge([answer(1, 1), answer(1, 1, says=2), answer(3, 30, status=503), answer(2, 30)], changes, 1)
    assert (verdict.answers, verdict.failed, verdict.wrong, verdict.not_allowed) == (4, 1, 1, 2)


# -- faults of what carries the hints ----------------------------------------------------------------------


class Watch:
    """Waits for what a server puts into service."""

    def __init__(self, server: ms.ModelServer) -> None:
        self._server = server
        self._loaded: queue.SimpleQueue[str] = queue.SimpleQueue()
        server.core.observe(lambda event: self._loaded.put(event.version) if isinstance(event, VersionLoaded) else None)

    def until(self, version: str) -> None:
        while self._loaded.get(timeout=LIMIT_S) != version:
            pass
        assert self.answers() == version

    def answers(self) -> str:
        return self._server.predict(MODEL, {"x": [1.0]}, timeout_ms=20_000).model_version


@pytest.mark.promise("P4")
@pytest.mark.postgres
def test_a_database_that_dies_and_comes_back(own_postgres: servers.PostgresServer, tmp_path: Path) -> None:
    """While it is gone everything serves on; when it is back, the new connection alone makes the server look."""
    url, artifacts = own_postgres.url(own_postgres.create_database()), str(tmp_path / "artifacts")
    with ms.Registry(url, artifacts) as registry, ms.Registry(url, artifacts) as elsewhere:
        register(registry)
        server = ms.ModelServer(registry, cache_dir=tmp_path / "cache", changes="postgres", poll_s=3600)
        watch = Watch(server)
        with server:
            watch.until("1")
            elsewhere.promote(MODEL, "2")
            watch.until("2")
            own_postgres.crash()
            assert watch.answers() == "2"
            with pytest.raises(ms.BackendUnavailable):
                elsewhere.promote(MODEL, "3")
            own_postgres.start()
            elsewhere.promote(MODEL, "3")
            watch.until("3")


@pytest.mark.promise("P4")
@pytest.mark.postgres
def test_a_database_that_stands_still(own_postgres: servers.PostgresServer, tmp_path: Path) -> None:
    """While it answers nobody everything serves on, and what was promoted before and after is reached."""
    url, artifacts = own_postgres.url(own_postgres.create_database()), str(tmp_path / "artifacts")
    with ms.Registry(url, artifacts) as registry, ms.Registry(url, artifacts) as elsewhere:
        register(registry)
        server = ms.ModelServer(registry, cache_dir=tmp_path / "cache", changes="postgres", poll_s=0.1)
        watch = Watch(server)
        with server:
            watch.until("1")
            own_postgres.signal(signal.SIGSTOP)
            try:
                assert {watch.answers() for _ in range(50)} == {"1"}
            finally:
                own_postgres.signal(signal.SIGCONT)
            elsewhere.promote(MODEL, "2")
            watch.until("2")


@pytest.mark.promise("P7")
@pytest.mark.postgres
def test_a_server_closes_while_its_database_stands_still(own_postgres: servers.PostgresServer, tmp_path: Path) -> None:
    """Whatever waits for the database, close does not, and nobody listens after it."""
    url, artifacts = own_postgres.url(own_postgres.create_database()), str(tmp_path / "artifacts")
    with ms.Registry(url, artifacts) as registry:
        register(registry)
        server = ms.ModelServer(registry, cache_dir=tmp_path / "cache", changes="postgres", poll_s=0.01)
        watch = Watch(server)
        server.start()
        watch.until("1")
        own_postgres.signal(signal.SIGSTOP)
        try:
            closing = threading.Thread(target=server.close)
            closing.start()
            closing.join(20)
            assert not closing.is_alive()
            assert [each for each in threading.enumerate() if each.name.startswith("modelserve-changes")] == []
        finally:
            own_postgres.signal(signal.SIGCONT)


@pytest.mark.promise("P4")
@pytest.mark.redis
def test_a_redis_that_dies_and_comes_back(own_redis: servers.RedisServer, tmp_path: Path) -> None:
    """Without it changes are found by polling, and with it again they are told."""
    url = f"sqlite:///{tmp_path}/models.db"
    with ms.Registry(url) as registry, ms.Registry(url, changes=own_redis.url) as elsewhere:
        register(registry)
        polling = ms.ModelServer(registry, cache_dir=tmp_path / "cache", changes=own_redis.url, poll_s=0.1)
        told = ms.ModelServer(registry, cache_dir=tmp_path / "cache", changes=own_redis.url, poll_s=3600)
        watches = Watch(polling), Watch(told)
        with polling, told:
            for watch in watches:
                watch.until("1")
            own_redis.kill()
            elsewhere.promote(MODEL, "2")
            watches[0].until("2")
            assert watches[1].answers() == "1"
            own_redis.start()
            watches[1].until("2")
            elsewhere.promote(MODEL, "3")
            for watch in watches:
                watch.until("3")
