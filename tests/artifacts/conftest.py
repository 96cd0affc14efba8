"""A store with something in it, a cache, and other processes on the same folder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from modelserve.artifacts import ArtifactStore
from modelserve.types import Artifact
from tests.artifacts.stores import CountingStore

Start: TypeAlias = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """The URL of a local store."""
    return str(tmp_path / "store")


@pytest.fixture
def store(root: str) -> CountingStore:
    """A local store that counts what is read."""
    return CountingStore(root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the cache lies."""
    return tmp_path / "cache"


@pytest.fixture
def start(root: str, folder: Path) -> Iterator[Start]:
    """Start another process on the store and the cache: ``start(task, artifact, *arguments)``."""
    with contextlib.ExitStack() as running:

        def start(
            task: str, artifact: Artifact, *arguments: str, pass_fds: tuple[int, ...] = (), url: str = root
        ) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "tests.artifacts.worker", task, url, str(folder)]
            process = running.enter_context(
                subprocess.Popen(
                    [*command, artifact.key, str(artifact.size), *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    pass_fds=pass_fds,
                )
            )
            running.callback(process.kill)
            return process

        yield start


def model_folder(parent: Path) -> Path:
    """Make a small model that is a folder."""
    folder = parent / "model"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"weights" * 1000)
    (folder / "variables.index").write_bytes(b"")
    return folder


def flip(path: Path) -> None:
    """Flip one bit of a file, read-only or not."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def put(store: ArtifactStore, data: bytes) -> Artifact:
    """Store bytes under a format of no importance."""
    return store.put_bytes(data, format="raw")
