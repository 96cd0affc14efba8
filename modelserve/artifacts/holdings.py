"""What one process has of a disk cache: the keys that it leases, a lock for each, and how its downloads ended."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import IO

from modelserve.errors import ArtifactCorrupt


class Holdings:
    """Those of the process that made it. ``closing`` is set when no download is wanted any more."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closing = threading.Event()
        self.downloads: Counter[str] = Counter()
        self._leases: Counter[str] = Counter()
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def lock_of(self, key: str) -> threading.Lock:
        """Return the lock of a key."""
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())

    def lease(self, key: str) -> None:
        """Note one more use of a key, until it is released."""
        with self._guard:
            self._leases[key] += 1

    def release(self, key: str, held: IO[bytes]) -> None:
        """End a use, and close its file. Safe to call twice."""
        if self.pid != os.getpid():  # a forked child lets go of its copy; the guard may have been copied locked
            held.close()
            return
        with self._guard:
            if not held.closed:
                self._leases[key] -= 1
                held.close()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count a download by how it ends."""
        result = "failed"
        try:
            yield
            result = "ok"
        except ArtifactCorrupt:
            result = "corrupt"
            raise
        finally:
            with self._guard:
                self.downloads[result] += 1

    @contextlib.contextmanager
    def unless_used(self, key: str) -> Iterator[bool]:
        """Give whether no thread of this process fetches or leases the key; if so, none does until the end."""
        lock = self.lock_of(key)
        if not lock.acquire(blocking=False):
            yield False
            return
        try:
            yield not self._leases[key]
        finally:
            lock.release()


class OfThisProcess:
    """Gives the holdings of the process that asks. After a fork these are new: locks and leases were the parent's."""

    def __init__(self) -> None:
        self._holdings = Holdings()

    def __call__(self) -> Holdings:
        """Return them."""
        if self._holdings.pid != os.getpid():
            self._holdings = Holdings()
        return self._holdings
