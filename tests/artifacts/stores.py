"""Stores that count, damage, break off or wait: a real store behind, and a fault in its stream."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator

from modelserve.artifacts import ArtifactStore
from modelserve.errors import BackendUnavailable


class CountingStore(ArtifactStore):
    """Counts what is read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []

    def read(self, key: str) -> Generator[bytes, None, None]:
        self.reads.append(key)
        return super().read(key)


class FlakyStore(CountingStore):
    """Does something else than it should for the first ``times`` reads."""

    def __init__(self, url: str, fault: str, times: int) -> None:
        super().__init__(url)
        self._fault = fault
        self._times = times

    def read(self, key: str) -> Generator[bytes, None, None]:
        pieces = super().read(key)
        return pieces if len(self.reads) > self._times else self._broken(b"".join(pieces))

    def _broken(self, data: bytes) -> Generator[bytes, None, None]:
        half = len(data) // 2
        match self._fault:
            case "ends early":
                yield data[:half]
            case "ends at once":
                return
            case "breaks off":
                yield data[:half]
                raise BackendUnavailable("artifact store", "the connection was reset")
            case "does not answer":
                raise BackendUnavailable("artifact store", "no route")
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

    def read(self, key: str) -> Generator[bytes, None, None]:
        data = b"".join(super().read(key))
        yield data[: len(data) // 2]
        self.is_half_way.set()
        assert self.may_go_on.wait(30)
        yield data[len(data) // 2 :]
