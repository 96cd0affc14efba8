"""A registry with both versions of the flight model, and programs of our own on real sockets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

import modelserve as ms
from examples import flights
from tests.servers import free_port

Serve = Callable[[list[str]], AbstractContextManager[httpx.Client]]
_START_LIMIT_S = 50


@pytest.fixture(scope="session")
def flights_registry(tmp_path_factory: pytest.TempPathFactory) -> ms.Registry:
    """Version 1.0.0 in production, 2.0.0 in staging, trained on a slice of the real flights."""
    folder = tmp_path_factory.mktemp("flights")
    rows = flights.load_flights((1,)).sample(3000, random_state=0)
    registry = ms.Registry(f"sqlite:///{folder}/models.db")
    for version, train in (("1.0.0", flights.train_linear), ("2.0.0", flights.train_boosted)):
        example = rows[flights.INPUTS][:4]
        registry.register(flights.MODEL, version, train(rows), example=example, method="predict_proba")
    registry.promote(flights.MODEL, "1.0.0")
    return registry


@pytest.fixture
def serve(flights_registry: ms.Registry, tmp_path: Path) -> Serve:
    """Run a web server program on a free port (``PORT`` in its arguments), and give a client to it."""
    database = flights_registry._database.file
    settings = {
        "MODELSERVE_REGISTRY": f"sqlite:///{database}",
        "MODELSERVE_CACHE_DIR": str(tmp_path / "cache"),
        "MODELSERVE_POLL_S": "0.1",
        "OMP_NUM_THREADS": "1",
    }

    @contextlib.contextmanager
    def run(arguments: list[str]) -> Iterator[httpx.Client]:
        port = str(free_port())
        command = [sys.executable, *(each.replace("PORT", port) for each in arguments)]
        with (
            subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True) as program,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        ):
            try:
                _wait_until_ready(program, client)
                yield client
            finally:
                program.terminate()
                _, log = program.communicate(timeout=30)
        assert "Traceback" not in log, log

    return run


def _wait_until_ready(program: subprocess.Popen[str], client: httpx.Client) -> None:
    give_up = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up and program.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/ml/health/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the program did not become ready")
