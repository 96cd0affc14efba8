"""The figures of several processes of one host, in a folder: each keeps a file, and any can read them all.

A process holds a lock on a file of its own for as long as it lives; that is how the others know. What it counted stays
when it ends. Many such files are folded into one, so that a host whose workers come and go does not fill the folder.

Nobody waits for anybody: a process that stands still must not hold up those that are well. Files are replaced whole,
whoever reads while others fold reads again, and what somebody else is folding is left to him.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from modelserve.errors import ConfigError
from modelserve.monitor.metrics.exposition import KEPT_S, Figures, Samples, add

_FOLD_ABOVE: Final = 16
_READ_AGAIN: Final = 5
_FOLDED: Final = "ended.json"
_DRAFT: Final = re.compile(r"(?P<process>\d+-[0-9a-f]{12})\.\d+\.draft")
_FOREIGN: Final = (ValueError, KeyError, TypeError, AttributeError)  # what comes of a file that has another form


class HostMetrics(NamedTuple):
    """The figures of the processes that live, and of those that have ended."""

    alive: list[Figures]
    ended: list[Figures]


class _File(NamedTuple):
    """What a process left in the folder."""

    name: str
    figures: Figures
    written_at: float
    alive: bool


class _Folded(NamedTuple):
    """What is left of processes that have ended, when their files are gone.

    ``loaded_at`` says when a version was last seen to be loaded. ``names`` are files that may still be there though
    they are counted here.
    """

    counts: dict[str, Samples]
    loaded_at: dict[str, float]
    names: list[str]


class MetricsFolder:
    """This process' place in the folder. Raises ``ConfigError`` when there cannot be one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._life = self._path("lock").open("wb")
            fcntl.flock(self._life, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep()
        except OSError as error:
            raise ConfigError(f"metrics_dir: {folder} cannot be used: {error.strerror}; give a local folder") from error

    def write(self, figures: Figures) -> None:
        """Let the others read this process' figures."""
        self._replace(self._path("json"), figures._asdict())

    def exchange(self, figures: Figures) -> HostMetrics:
        """Write this process' figures and return those of all others."""
        with contextlib.suppress(OSError):  # a full disk can be read; `write` is called often, and raises
            self.write(figures)
        folded, files = self._look()
        if sum(not file.alive for file in files) > _FOLD_ABOVE:
            with contextlib.suppress(OSError):  # next time, or somebody else is at it
                self._fold()
        alive = [file.figures for file in files if file.alive and file.name != self._name]
        return HostMetrics(alive, [Figures(folded.counts, {}), *(file.figures for file in files if not file.alive)])

    def close(self, figures: Figures) -> None:
        """Leave the last figures behind."""
        try:
            self.write(figures)
        finally:
            self._life.close()
            self._path("lock").unlink(missing_ok=True)

    def _look(self) -> tuple[_Folded, list[_File]]:
        """Return what there is, of one moment: not without files that were folded meanwhile."""
        for _ in range(_READ_AGAIN):
            before = self._last_fold()
            folded = self._read_folded()
            files = self._read_files(folded.names)
            if self._last_fold() == before:
                break
        return folded, files

    def _fold(self) -> None:
        """Make one file of those of ended processes. It names them: until they are gone they do not count twice.

        Raises ``BlockingIOError`` when another process does.
        """
        with (self._folder / "turn.lock").open("ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folded, files = self._look()
            left = [name for name in folded.names if self._path("json", name).exists()]
            folded = _fold(folded._replace(names=left), files, time.time())
            self._replace(self._folder / _FOLDED, folded._asdict())
            for name in folded.names:
                self._path("lock", name).unlink(missing_ok=True)
                self._path("json", name).unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what processes were writing when they were killed."""
        for draft in self._folder.glob("*.draft"):
            name = _DRAFT.fullmatch(draft.name)  # the folder may hold what is none of ours
            if name is not None and not self._lives(name["process"]):
                draft.unlink(missing_ok=True)

    def _lives(self, name: str) -> bool:
        if name == self._name:
            return True
        try:
            with self._path("lock", name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:  # it is locked, or cannot be looked at now: nothing to take a process for dead on
            return True
        return False

    def _read_files(self, folded: Sequence[str]) -> list[_File]:
        found = []
        for path in sorted(self._folder.glob("[0-9]*-*.json")):
            if path.stem not in folded:
                alive = self._lives(path.stem)  # before it is read: what one that has ended wrote is its last word
                with contextlib.suppress(OSError, *_FOREIGN):  # gone meanwhile, or none of ours
                    figures = _figures(orjson.loads(path.read_bytes()))
                    found.append(_File(path.stem, figures, path.stat().st_mtime, alive))
        return found

    def _read_folded(self) -> _Folded:
        try:
            document = orjson.loads((self._folder / _FOLDED).read_bytes())
            return _Folded(_by_version(document["counts"]), _samples(document["loaded_at"]), list(document["names"]))
        except (FileNotFoundError, *_FOREIGN):  # not any OSError: what follows may replace it
            return _Folded({}, {}, [])

    def _last_fold(self) -> tuple[int, int] | None:
        """Return what is another after each fold."""
        try:
            found = (self._folder / _FOLDED).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _replace(self, path: Path, document: Any) -> None:
        draft = self._folder / f"{self._name}.{threading.get_native_id()}.draft"  # no *.json, or it would be read
        draft.write_bytes(orjson.dumps(document))
        draft.replace(path)

    def _path(self, suffix: str, name: str | None = None) -> Path:
        return self._folder / f"{name or self._name}.{suffix}"


# -- what others wrote -------------------------------------------------------------------------------------


def _figures(document: Any) -> Figures:
    return Figures(_by_version(document["counts"]), _samples(document["gauges"]), _by_version(document["unloaded"]))


def _by_version(document: Any) -> dict[str, Samples]:
    return {version: _samples(each) for version, each in document.items()}


def _samples(document: Any) -> Samples:
    samples = {key: float(value) for key, value in document.items()}
    if not all(map(math.isfinite, samples.values())):
        raise ValueError("no figures")
    return samples


# -- folding -----------------------------------------------------------------------------------------------


def _fold(folded: _Folded, files: Sequence[_File], now: float) -> _Folded:
    """Add what processes left that have ended. Versions that nobody has had loaded for long are left out."""
    counts, loaded_at = folded.counts, folded.loaded_at
    for file in files:
        for version in file.figures.counts:
            loaded_at[version] = now if file.alive else max(file.written_at, loaded_at.get(version, 0.0))
    ended = [file for file in files if not file.alive]
    for file in ended:
        for found in (file.figures.counts, file.figures.unloaded):
            for version, samples in found.items():
                add(counts.setdefault(version, {}), samples)
    kept = {each for each in counts if not each or now - loaded_at.setdefault(each, now) < KEPT_S}
    return _Folded(
        {version: samples for version, samples in counts.items() if version in kept},
        {version: at for version, at in loaded_at.items() if version in kept},
        [*folded.names, *(file.name for file in ended)],
    )
