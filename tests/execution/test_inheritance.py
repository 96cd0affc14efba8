"""A worker starts and answers with anything that its host has set for the whole process."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from modelserve.errors import LoadFailed
from modelserve.execution import inheritance
from modelserve.testing.replicas import NUMBER, numbers, started
from tests.execution.faulty import FAULT
from tests.execution.hosting import process_replica

ROOT = Path(__file__).parents[2]


async def surroundings() -> dict[str, Any]:
    """Return what a worker finds around it."""
    async with started(process_replica("surroundings", NUMBER)) as replica:
        (found,) = await replica.infer(numbers(FAULT))
        assert await replica.infer(numbers(3.0)) == [6.0]
    return dict(found)


# -- states that a host gets into, and out of again --------------------------------------------------------


@contextlib.contextmanager
def default_timeout() -> Iterator[None]:
    socket.setdefaulttimeout(30)
    try:
        yield
    finally:
        socket.setdefaulttimeout(None)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def deleted_folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def odd_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["", b"bytes", Path("/a/path"), None, "relative", "/with:colon", *sys.path])
        yield


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    highest = max(int(fd.name) for fd in Path("/dev/fd").iterdir())
    sizes = {resource.RLIMIT_NOFILE: highest + 32, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1 << 20}
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        sizes[resource.RLIMIT_AS] = used + (2 << 30)
    before = {limit: resource.getrlimit(limit) for limit in sizes}
    try:
        for limit, size in sizes.items():
            resource.setrlimit(limit, (size, before[limit][1]))
        yield
    finally:
        for limit, pair in before.items():
            resource.setrlimit(limit, pair)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    ignored = (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """Hold more descriptors than ``select`` can name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1100:
            held.append(os.dup(held[0]))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PYTHON_VARIABLES = {
    "PYTHONSTARTUP": "/nonexistent.py",
    "PYTHONHOME": "/nonexistent",
    "PYTHONSAFEPATH": "1",
    "PYTHONINSPECT": "1",
    "PYTHONOPTIMIZE": "1",
}


@pytest.mark.parametrize(
    ("state", "seen"),
    [
        pytest.param(default_timeout, {}, id="default time-out of sockets"),
        pytest.param(lambda: umask(0o777), {"umask": 0o077}, id="umask 777"),
        pytest.param(lambda: umask(0), {"umask": 0}, id="umask 0"),
        pytest.param(deleted_folder, {"folder": "/"}, id="deleted folder"),
        pytest.param(lambda: variables(**PYTHON_VARIABLES), {"optimize": 1}, id="variables of Python"),
        pytest.param(lambda: variables(PYTHONWARNINGS="error"), {"warnings": ["error"]}, id="warnings as errors"),
        pytest.param(lambda: variables(LC_ALL="POSIX", LANG="C"), {"encoding": "utf-8"}, id="POSIX locale"),
        pytest.param(lambda: variables(LC_ALL="xx_YY.odd"), {"encoding": "utf-8"}, id="unknown locale"),
        pytest.param(odd_path, {}, id="odd import path"),
        pytest.param(small_limits, {}, id="small limits"),
        pytest.param(signals_ignored, {"children": True, "blocked": 0}, id="signals ignored"),
        pytest.param(signals_blocked, {"children": True, "blocked": 0}, id="signals blocked"),
        pytest.param(many_descriptors, {}, id="descriptors beyond 1024"),
    ],
)
async def test_a_worker_answers_whatever_its_host_has_set(
    state: Callable[[], AbstractContextManager[None]], seen: dict[str, Any]
) -> None:
    """What the operator set is kept; what would keep a worker from its work is not."""
    with state():
        found = await surroundings()
    assert {name: found[name] for name in seen} == seen


async def test_the_end_of_a_worker_is_noticed_where_the_host_reaps_no_child() -> None:
    """With SIGCHLD ignored there is no exit status to be had, and the end is the end all the same."""
    with signals_ignored():
        async with started(process_replica("double", NUMBER)) as replica:
            os.kill(replica.detail()["pid"], signal.SIGKILL)
            assert "it died" in await replica.ended()


async def test_a_worker_of_a_host_that_has_moved_finds_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of the import path that are relative mean the host's folder of the moment, as they do in the host."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("relative")
    found = await surroundings()
    assert found["folder"] == str(tmp_path)
    assert found["path"][0] == str(tmp_path / "relative")


# -- hosts that were started so ----------------------------------------------------------------------------

HOST = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import asyncio, json
from tests.execution.test_inheritance import surroundings
Path({result!r}).write_text(json.dumps(asyncio.run(surroundings())))
"""


def found_by_a_host(flags: list[str], result: Path, **options: Any) -> dict[str, Any]:
    """Run a host program with an odd main module; return what its worker found."""
    script = HOST.format(root=str(ROOT), result=str(result))
    ended = subprocess.run([sys.executable, *flags, "-c", script], timeout=50, check=False, **options)
    assert ended.returncode == 0
    return dict(json.loads(result.read_text()))


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        (["-O", "-W", "error"], {"optimize": 1, "warnings": ["error"]}),
        (["-X", "dev"], {"dev": True}),
        (["-I"], {"optimize": 0}),
    ],
    ids=" ".join,
)
def test_a_worker_has_the_flags_of_its_host(flags: list[str], seen: dict[str, Any], tmp_path: Path) -> None:
    """Asserts and warnings are what they are in the host; one that reads no environment has workers that read none."""
    misleading = {"PYTHONHOME": "/nonexistent", "PYTHONOPTIMIZE": "2"} if "-I" in flags else {}
    found = found_by_a_host(flags, tmp_path / "found", env=os.environ | misleading)
    assert {name: found[name] for name in seen} == seen


def _close_streams() -> None:
    os.closerange(0, 3)


def test_a_worker_of_a_host_without_streams_has_its_own(tmp_path: Path) -> None:
    """A daemon that has closed its streams: nothing that is printed ends up in a socket or in a batch."""
    found = found_by_a_host([], tmp_path / "found", preexec_fn=_close_streams)
    assert found["streams"] == [True] * 3


def test_streams_that_do_not_block_do_no_harm(tmp_path: Path) -> None:
    """Streams that the host shares with a program that made them non-blocking."""
    reading, writing = os.pipe()
    try:
        for fd in (reading, writing):
            os.set_blocking(fd, False)
        found = found_by_a_host([], tmp_path / "found", stdin=reading, stdout=writing, stderr=writing)
    finally:
        os.close(reading)
        os.close(writing)
    assert found["streams"] == [True] * 3


# -- where there is no interpreter, and no room ------------------------------------------------------------


def test_a_host_that_embeds_python_finds_it_beside_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under uWSGI ``sys.executable`` is uWSGI: Python is where its library is."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    beside = Path(sys.prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert inheritance.interpreter() == str(beside)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name in ("/usr/bin/uwsgi", "", None):
        monkeypatch.setattr(sys, "executable", name)
        with pytest.raises(LoadFailed, match=r"sys\.executable.*executor="):
            inheritance.interpreter()


async def test_a_host_without_an_interpreter_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error of the start says what is missing and what can be done."""
    monkeypatch.setattr(sys, "executable", None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(LoadFailed, match="needs a Python interpreter"):
        await process_replica("double", NUMBER).start()
