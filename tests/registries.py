"""The registry on SQLite and on a real PostgreSQL, and helpers to fill and to look into it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import sqlalchemy as sa

import modelserve
from modelserve.registry import Registry
from modelserve.types import Artifact, ModelVersion

ARTIFACT = Artifact(key="blobs/sha256/ab", sha256="ab" * 32, size=1234, format="skops")

Insert: TypeAlias = Callable[..., ModelVersion]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'models.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    """A registry on an empty database."""
    with Registry(registry_url) as registry:
        yield registry


@pytest.fixture(scope="session")
def insert() -> Insert:
    """Add a row with plausible values for everything that a test does not care about."""

    def insert(registry: Registry, model_name: str, version: str, **changed: Any) -> ModelVersion:
        values: dict[str, Any] = {
            "framework": "sklearn",
            "artifact": ARTIFACT,
            "signature": {"inputs": []},
            "load_options": {"method": "predict"},
            "example": None,
            "conversion": None,
            "metrics": {},
            "tags": {},
            "actor": "tester",
            "reason": "",
        }
        return registry._insert(model_name=model_name, version=version, **values | changed)

    return insert


@pytest.fixture
def bare_engine(registry_url: str) -> Iterator[sa.Engine]:
    """An engine of our own on the same database, for looking past the registry."""
    engine = sa.create_engine(registry_url.replace("postgresql://", "postgresql+psycopg://"))
    yield engine
    engine.dispose()


@pytest.fixture
def run_workers(registry_url: str) -> Callable[..., list[str]]:
    """Run ``worker.py`` in several processes that start their work at the same moment; return what each printed."""

    def run(task: str, processes: int) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(modelserve.__file__).parents[1])}
        program = str(Path(__file__).parent / "registry" / "worker.py")
        command = [sys.executable, "-W", "error", program, task, registry_url]
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(_started(command, environment)) for _ in range(processes)]
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            ended = [(*worker.communicate(timeout=50), worker.returncode) for worker in workers]
        assert [(code, complaints) for _, complaints, code in ended] == [(0, "")] * processes
        return [printed.strip() for printed, _, _ in ended]

    return run


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as worker:
        try:
            yield worker
        finally:
            worker.kill()
