"""A watch over what replicas leave behind."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail the test when it leaves a process, a descriptor, a thread or shared memory behind."""
    before, older = _held(), set(threading.enumerate())
    yield
    for each in threading.enumerate():
        if each not in older and each.name.startswith("modelserve"):
            each.join(10)
    assert _held() == before


def _held() -> dict[str, Any]:
    memory = Path("/dev/shm")  # noqa: S108  # to see that nothing is put there
    descriptors = Path("/proc/self/fd")
    return {
        "children": _children(),
        "descriptors": len(list(descriptors.iterdir())) if descriptors.exists() else 0,
        "threads": sorted(each.name for each in threading.enumerate() if each.name.startswith("modelserve")),
        "shared memory": sorted(
            each.name
            for each in memory.iterdir()
            if not each.name.startswith(("PostgreSQL.", "sem."))  # a server's, or another test process's
        )
        if memory.exists()
        else [],
    }


def _children() -> set[int]:
    with subprocess.Popen(["ps", "-axo", "pid=,ppid="], stdout=subprocess.PIPE, text=True) as ps:
        listed, _ = ps.communicate()
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return {pid for pid, parent in pairs if parent == os.getpid() and pid != ps.pid}
