"""How much memory there is, read from files like the kernel's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.serving.host_memory import Memory, needed

MB = 1024 * 1024


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A machine of 1000 MB, of which 600 MB are available, without a limit on any group."""
    write(tmp_path / "proc" / "meminfo", f"MemTotal: {1000 * 1024} kB\nMemAvailable:   {600 * 1024} kB\n")
    write(tmp_path / "proc" / "self" / "cgroup", "0::/pods/mine\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def limit(system: Path, group: str, most: object, current: int = 0, files: int = 0) -> None:
    folder = system / "cgroup" / group
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{current}\n")
    write(folder / "memory.stat", f"anon 5\nfile 999999999\ninactive_file {files}\nactive_file 0\n")


def memory(system: Path) -> Memory:
    return Memory(system / "proc", system / "cgroup")


def test_without_a_limit_it_is_what_the_machine_has(system: Path) -> None:
    """Groups that say "max", or are not there, bound nothing."""
    assert memory(system).available() == 600 * MB
    limit(system, "pods/mine", "max", 5)
    assert memory(system).available() == 600 * MB


def test_the_tightest_limit_around_the_process_counts(system: Path) -> None:
    """A limit leaves what is not used of it; what only caches files can be had. The groups around count too."""
    limit(system, "pods/mine", 500 * MB, current=450 * MB, files=100 * MB)
    assert memory(system).available() == 150 * MB
    limit(system, "pods", 700 * MB, current=600 * MB)
    assert memory(system).available() == 100 * MB
    limit(system, "", 90 * MB, current=95 * MB)
    assert memory(system).available() == 0


def test_all_that_there_is_counts_what_is_used(system: Path) -> None:
    """The total is the machine's, or the tightest limit around the process, whatever is taken of it."""
    assert memory(system).total() == 1000 * MB
    limit(system, "pods/mine", 500 * MB, current=450 * MB)
    limit(system, "pods", "max", current=600 * MB)
    assert memory(system).total() == 500 * MB


def test_where_nothing_is_told_nothing_is_known(tmp_path: Path) -> None:
    """No such files, as on macOS, or files of another form give no figure and no error."""
    assert memory(tmp_path).available() is None
    assert memory(tmp_path).taken_by(1) is None
    assert memory(tmp_path).total() is None
    write(tmp_path / "proc" / "meminfo", "MemAvailable:\n")
    write(tmp_path / "proc" / "self" / "cgroup", "0::/../../elsewhere\n")
    limit(tmp_path, "", "many")
    assert memory(tmp_path).available() is None


def test_a_process_takes_what_it_does_not_share(system: Path) -> None:
    """Anonymous and shared memory count, mapped files do not."""
    write(system / "proc" / "7" / "status", "VmRSS: 900 kB\nRssAnon:\t 300 kB\nRssFile: 500 kB\nRssShmem: 100 kB\n")
    assert memory(system).taken_by(7) == 400 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
def test_this_machine_tells() -> None:
    """The real files are read: this process takes a few megabytes and less than there is."""
    taken = Memory().taken_by(os.getpid())
    assert taken is not None
    assert MB < taken < 100_000 * MB
    assert Memory().available() is not None


@given(size=st.integers(0, 10**12), before=st.integers(0, 10**12), taken=st.none() | st.integers(0, 10**12))
def test_the_estimate_grows_with_the_artifact(size: int, before: int, taken: int | None) -> None:
    """It is never less than what was measured, and a larger artifact never needs less."""
    estimate = needed(size=size, before=before, taken=taken)
    assert estimate >= (taken or 0)
    assert needed(size=size + 1, before=before, taken=taken) >= estimate
    assert taken is not None or estimate >= size
