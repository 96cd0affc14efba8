"""``GET /metrics`` of real hosts: through both faces, and as the sum of several worker processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import modelserve as ms
from modelserve.testing.models import telltale
from tests.http.driver import Caller, asgi_caller, call_wsgi
from tests.servers import free_port

X = np.array([[1.0], [2.0]])
HOST = """
import modelserve as ms
server = ms.ModelServer(
    ms.Registry("sqlite:///models.db"), cache_dir="cache", log=False, metrics_dir="metrics", poll_s=0.1
)
app = ms.wsgi(server)
"""
GUNICORN = """
import os
workers = 3
threads = 2
def post_worker_init(worker):
    from host import server
    server.start()
def worker_exit(server, worker):
    from host import server
    server.close()
"""
OK = 'modelserve_requests_total{model="m",version="1",outcome="ok"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a registry that has version 1 of ``m`` in production."""
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        for version in (1, 2, 3):
            registry.register("m", str(version), telltale(version), example=X)
        registry.promote("m", "1")
    return tmp_path


def samples(text: str) -> dict[str, float]:
    """Read the text format, as strictly as its few rules are."""
    found = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) modelserve_\w+ \S.*", line)
        else:
            key, _, value = line.rpartition(" ")
            assert re.fullmatch(r"modelserve_\w+(\{(\w+=\"[^\"]*\",?)*\})?", key)
            assert key not in found
            found[key] = float(value)
    return found


def caller(face: str, server: ms.ModelServer) -> Caller:
    """Return what calls a server through one of its faces."""
    if face == "asgi":
        return asgi_caller(server, ms.asgi(server.core))
    app = ms.wsgi(server)
    return lambda method, path, body=b"", headers=(): call_wsgi(app, method, path, body, headers)


@pytest.mark.parametrize("face", ["asgi", "wsgi"])
def test_both_faces_show_what_was_served(face: str, folder: Path) -> None:
    """Requests, their latencies, the pool and the log are there; without metrics the route is not."""
    with ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        with ms.ModelServer(registry, cache_dir=folder / "cache") as server:
            call = caller(face, server)
            for _ in range(5):
                server.predict("m", {"x": [1.0]})
            with pytest.raises(ms.InvalidInput):
                server.predict("m", {"x": "no"})
            answer = call("GET", "/metrics")
            assert answer.status == 200
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            found = samples(answer.body.decode())
            assert found[OK] == 5
            assert found['modelserve_requests_total{model="m",version="1",outcome="invalid_input"}'] == 1
            assert found['modelserve_request_duration_seconds_count{model="m",version="1"}'] == 6
            assert found['modelserve_replicas{model="m",version="1",state="ready"}'] == 1
            assert found['modelserve_batches_total{model="m",version="1"}'] >= 5
            assert found["modelserve_processes"] == 1
            assert 'modelserve_log_records_total{result="written"}' in found
            assert server.metrics() is not None
            assert call("POST", "/metrics").status == 405
            assert "/metrics" in call("GET", "/openapi.json").json()["paths"]
        with ms.ModelServer(registry, cache_dir=folder / "cache", metrics=False) as server:
            without = asgi_caller(server, ms.asgi(server.core))
            assert without("GET", "/metrics").status == 404
            assert "/metrics" not in without("GET", "/openapi.json").json()["paths"]


def test_caches_and_features_are_among_them(folder: Path) -> None:
    """What came from the cache, what the feature store gave and what was downloaded is there, and stays to the end."""
    writer = ms.FeatureWriter("memory://")
    writer.put("user_id", 1, {"x": [1.0]})
    options = ms.ModelOptions(cache_ttl_s=60, features=ms.Features("user_id", ["x"], defaults={"x": [0.0]}))
    with ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        server = ms.ModelServer(
            registry, {"m": options}, cache_dir=folder / "cache", features=writer.store, metrics_dir=folder / "metrics"
        )
        with server:
            for user in (1, 1, 2):
                server.predict("m", {"user_id": user})
            found = samples((server.metrics() or b"").decode())
            assert found['modelserve_cache_requests_total{model="m",result="miss"}'] == 1
            assert found['modelserve_cache_requests_total{model="m",result="local"}'] == 1
            assert found['modelserve_feature_reads_total{model="m",store="MemoryFeatures",status="present"}'] == 2
            assert found['modelserve_feature_reads_total{model="m",store="MemoryFeatures",status="missing"}'] == 1
            assert found['modelserve_feature_wait_seconds_count{store="MemoryFeatures"}'] == 3
            assert found['modelserve_degraded_rows_total{model="m",version="1"}'] == 1
            assert found['modelserve_artifact_downloads_total{result="ok"}'] == 2  # the model and its example
        with server:
            after = samples((server.metrics() or b"").decode())
    counts = [key for key in found if "_total" in key and "log_records" not in key]
    assert [key for key in counts if after.get(key, 0.0) < found[key]] == []


def test_a_database_that_stands_still_holds_up_no_scrape(folder: Path) -> None:
    """The threads that wait for it are not those that read the folder."""
    over = threading.Event()
    with (
        ms.Registry(f"sqlite:///{folder}/models.db") as registry,
        ms.ModelServer(registry, cache_dir=folder / "cache", metrics_dir=folder / "metrics") as server,
    ):
        for _ in range(10):
            server.core._require_running().executors.sql.submit(over.wait, 30)
        try:
            began = time.monotonic()
            assert samples((server.metrics() or b"").decode())["modelserve_processes"] == 1
            assert time.monotonic() - began < 1
        finally:
            over.set()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_gunicorn_with_three_workers_is_one(folder: Path, gunicorn: httpx.Client) -> None:
    """Whichever worker answers, the figures are those of all, also of one that was killed; they never go back."""
    served = 0
    seen = 0.0

    def ask(times: int) -> None:
        nonlocal served
        for _ in range(times):
            served += gunicorn.post("/predict/m", json={"inputs": {"x": [1.0]}}).status_code == 200

    def scraped() -> dict[str, float]:
        nonlocal seen
        found = samples(gunicorn.get("/metrics").text)
        assert found.get(OK, 0.0) >= seen
        seen = found.get(OK, 0.0)
        return found

    until(lambda: scraped()["modelserve_processes"] == 3, "not all workers have joined")
    ask(60)
    until(lambda: scraped()[OK] == served, "requests are missing")
    replicas = 'modelserve_replicas{model="m",version="1",state="ready"}'
    until(lambda: scraped().get(replicas) == 3, "replicas are missing")

    os.kill(worker_of(folder), signal.SIGKILL)
    until(lambda: alive(folder) == 3, "the worker was not replaced")
    until(lambda: scraped()["modelserve_processes"] == 3, "its place was not taken")
    ask(30)
    until(lambda: scraped()[OK] == served, "requests of the one that was killed are missing")

    with ms.Registry(f"sqlite:///{folder}/models.db") as registry:
        registry.promote("m", "2")
        registry.promote("m", "3")
    applied = 'modelserve_registry_generation_applied{model="m"}'
    wanted = 'modelserve_registry_generation{model="m"}'
    until(lambda: (found := samples(gunicorn.get("/metrics").text))[applied] == found[wanted] == 6, "not all followed")
    until(lambda: 'version="1"' not in gunicorn.get("/metrics").text, "labels of a freed version are left")


@pytest.fixture
def gunicorn(folder: Path) -> Iterator[httpx.Client]:
    """A client of gunicorn with three workers, a new connection for each request."""
    (folder / "host.py").write_text(HOST, encoding="utf-8")
    (folder / "gunicorn.conf.py").write_text(GUNICORN, encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "host:app"]
    environment = os.environ | {"PYTHONPATH": str(Path(ms.__file__).parents[1])}
    limits = httpx.Limits(max_keepalive_connections=0)
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as host,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=limits) as client,
    ):
        try:
            until(lambda: alive(folder) == 3 and answers(client), "gunicorn does not answer")
            yield client
        finally:
            host.terminate()
            host.wait(30)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/metrics").status_code == 200
    except httpx.TransportError:
        return False


def locks(folder: Path) -> list[Path]:
    return [path for path in (folder / "metrics").glob("*-*.lock") if path.exists()]


def pids(folder: Path) -> list[int]:
    found = [int(path.name.partition("-")[0]) for path in locks(folder)]
    return [pid for pid in found if runs(pid)]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def alive(folder: Path) -> int:
    return len(pids(folder))


def worker_of(folder: Path) -> int:
    return pids(folder)[0]


def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)
