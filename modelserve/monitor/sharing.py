"""The figures of several processes of one host, in a folder: each keeps a file, and any can read them all.

A process holds a lock on a file of its own for as long as it lives; that is how the others know. What it counted stays
when it ends. Many such files are folded into one, so that a host whose workers come and go does not fill the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

import orjson

from modelserve.errors import ConfigError
from modelserve.monitor.exposition import Figures, Samples

_FOLD_ABOVE: Final = 16
_ENDED: Final = "ended.json"


class Everybody(NamedTuple):
    """The figures of the processes that live, and of those that have ended."""

    alive: list[Figures]
    ended: list[Figures]


class SharedFigures:
    """This process' place in the folder. Raises ``ConfigError`` when there cannot be one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._life = (folder / f"{self._name}.lock").open("wb")
            fcntl.flock(self._life, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"metrics_dir: {folder} cannot be used: {error.strerror}; give a local folder") from error

    def write(self, figures: Figures) -> None:
        """Let the others read this process' figures."""
        self._replace(f"{self._name}.json", orjson.dumps(figures._asdict()))

    def exchange(self, figures: Figures) -> Everybody:
        """Write this process' figures and return those of all."""
        self.write(figures)
        with self._turn(fcntl.LOCK_SH):
            everybody, ended = self._look()
        if len(ended) > _FOLD_ABOVE:
            self._fold()
        return everybody

    def close(self, figures: Figures) -> None:
        """Leave the last figures behind."""
        self.write(figures)
        self._life.close()
        (self._folder / f"{self._name}.lock").unlink(missing_ok=True)

    def _look(self) -> tuple[Everybody, list[str]]:
        """Return everybody's figures, and the names of the files of processes that have ended."""
        past = self._read(_ENDED)
        folded = set() if past is None else set(past[1])
        everybody = Everybody([], [] if past is None else [past[0]])
        names = []
        for path in sorted(self._folder.glob("*-*.json")):
            found = None if path.stem in folded else self._read(path.name)
            if found is not None and self._lives(path.stem):
                everybody.alive.append(found[0])
            elif found is not None:
                everybody.ended.append(found[0])
                names.append(path.stem)
        return everybody, names

    def _fold(self) -> None:
        """Make one file of those of ended processes. It names them: until they are gone they do not count twice."""
        with self._turn(fcntl.LOCK_EX):
            everybody, names = self._look()
            counts: dict[str, Samples] = {}
            for figures in everybody.ended:
                for version, samples in figures.counts.items():
                    summed = counts.setdefault(version, {})
                    for key, value in samples.items():
                        summed[key] = summed.get(key, 0.0) + value
            self._replace(_ENDED, orjson.dumps({"counts": counts, "gauges": {}, "folded": names}))
            for name in names:
                (self._folder / f"{name}.json").unlink(missing_ok=True)
                (self._folder / f"{name}.lock").unlink(missing_ok=True)

    def _lives(self, name: str) -> bool:
        if name == self._name:
            return True
        try:
            with (self._folder / f"{name}.lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _read(self, name: str) -> tuple[Figures, list[str]] | None:
        try:
            document = orjson.loads((self._folder / name).read_bytes())
            return Figures(document["counts"], document["gauges"]), document.get("folded", [])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # gone meanwhile, or none of ours

    def _replace(self, name: str, data: bytes) -> None:
        draft = self._folder / f".{self._name}.{name}"
        draft.write_bytes(data)
        draft.replace(self._folder / name)

    @contextlib.contextmanager
    def _turn(self, operation: int) -> Iterator[IO[bytes]]:
        with (self._folder / "turn.lock").open("ab") as file:
            fcntl.flock(file, operation)
            yield file
