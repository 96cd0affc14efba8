"""Stores that count, damage, break off or wait: a real store behind, and a fault in its stream."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Generator, Iterator

from modelserve.artifacts import ArtifactStore
from modelserve.ports import Interrupted, ObjectChanged, OpenObject


class CountingStore(ArtifactStore):
    """Counts what is read: the keys, and where each attempt began."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []
        self.starts: list[int] = []

    @contextlib.contextmanager
    def _attempt(self, key: str, start: int, tag: str | None) -> Iterator[OpenObject]:
        self.reads.append(key)
        self.starts.append(start)
        with super()._attempt(key, start, tag) as opened:
            yield opened


class FlakyStore(CountingStore):
    """Does something else than it should for the first ``times`` attempts."""

    def __init__(self, url: str, fault: str, times: int) -> None:
        super().__init__(url)
        self._fault = fault
        self._times = times

    @contextlib.contextmanager
    def _attempt(self, key: str, start: int, tag: str | None) -> Iterator[OpenObject]:
        with super()._attempt(key, start, tag) as opened:
            if len(self.reads) > self._times:
                yield opened
            elif self._fault == "is replaced":
                raise ObjectChanged
            else:
                yield opened._replace(pieces=self._broken(b"".join(opened.pieces)))

    def _broken(self, data: bytes) -> Generator[bytes, None, None]:
        half = len(data) // 2
        match self._fault:
            case "ends early":
                yield data[:half]
            case "ends at once":
                return
            case "breaks off":
                yield data[:half]
                raise Interrupted("the connection was reset")
            case "does not answer":
                raise Interrupted("no route")
            case "refuses":
                raise PermissionError
            case "flips a bit":
                yield data[:half]
                yield bytes([data[half] ^ 1]) + data[half + 1 :]
            case "does not end":
                yield from itertools.repeat(data)


class WaitingStore(CountingStore):
    """Stops in the middle of every stream until it may go on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.is_half_way = threading.Event()
        self.may_go_on = threading.Event()

    @contextlib.contextmanager
    def _attempt(self, key: str, start: int, tag: str | None) -> Iterator[OpenObject]:
        with super()._attempt(key, start, tag) as opened:
            yield opened._replace(pieces=self._halves(b"".join(opened.pieces)))

    def _halves(self, data: bytes) -> Generator[bytes, None, None]:
        yield data[: len(data) // 2]
        self.is_half_way.set()
        assert self.may_go_on.wait(30)
        yield data[len(data) // 2 :]
