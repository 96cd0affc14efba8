"""How much memory there is, as the operating system reports it, and how much a further copy of a model would take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_PER_BYTE: Final = 3  # of a file: 1.5 for an exported network, 3 for a forest of skops, 12 for one of onnx


class Memory:
    """Reads Linux's own figures: ``proc`` and ``cgroup`` are where they are mounted.

    Elsewhere there are none, and then nothing is known.
    """

    def __init__(self, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc = proc
        self._cgroup = cgroup

    def available(self) -> int | None:
        """Return how many bytes can be had before a process is killed for them; None where that is not known.

        That is the least of what the limits of this process's control groups (version 2) leave and what the machine
        has. What only caches files counts as available.
        """
        known = [*self._left_by_groups(), *_amounts(self._proc / "meminfo", "MemAvailable:")]
        return max(0, min(known)) if known else None

    def total(self) -> int | None:
        """Return how many bytes there are, used or not: what the control groups allow of what the machine has."""
        known = [*self._limits_of_groups(), *_amounts(self._proc / "meminfo", "MemTotal:")]
        return min(known) if known else None

    def taken_by(self, pid: int) -> int | None:
        """Return the bytes that a process has for itself, without the files it maps; None where that is not known."""
        status = self._proc / str(pid) / "status"
        parts = [*_amounts(status, "RssAnon:"), *_amounts(status, "RssShmem:")]
        return sum(parts) if parts else None

    def _left_by_groups(self) -> Iterator[int]:
        for group in self._groups():
            with contextlib.suppress(OSError, ValueError):  # no such limit ("max"), or no such group
                limit = int(_read(group / "memory.max"))
                yield limit - int(_read(group / "memory.current")) + _of_files(_read(group / "memory.stat"))

    def _limits_of_groups(self) -> Iterator[int]:
        for group in self._groups():
            with contextlib.suppress(OSError, ValueError):
                yield int(_read(group / "memory.max"))

    def _groups(self) -> Iterator[Path]:
        """Give the control group of this process and those around it; inside a container, the container's."""
        yield self._cgroup
        with contextlib.suppress(OSError, ValueError):
            lines = _read(self._proc / "self" / "cgroup").splitlines()
            own = PurePosixPath(next((line[4:] for line in lines if line.startswith("0::/")), ""))
            yield from (
                self._cgroup / group for group in (own, *own.parents) if group.parts and ".." not in group.parts
            )


def needed(*, size: int, before: int, taken: int | None) -> int:
    """Estimate the bytes that one replica of an artifact of ``size`` bytes will take.

    ``taken`` is what a replica of the version before was measured to take, whose artifact has ``before`` bytes; None
    when that is not known.
    """
    return _PER_BYTE * size if taken is None else taken + _PER_BYTE * max(0, size - before)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace")


def _amounts(path: Path, name: str) -> Iterator[int]:
    """Give the amount on the line of that name, in bytes, if there is one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _read(path).splitlines():
            if line.startswith(name):
                yield int(line.split()[1]) * 1024


def _of_files(stat: str) -> int:
    """Return the bytes that a group has in caches of files, which are given up before a process is killed."""
    amounts = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return sum(int(amounts.get(name, 0)) for name in ("active_file", "inactive_file"))
