"""One file of an artifact onto the local disk: found there and sound, or downloaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Final, NamedTuple

from modelserve.artifacts import blob, files
from modelserve.artifacts.eviction import BACKEND, Eviction
from modelserve.artifacts.holdings import OfThisProcess
from modelserve.artifacts.layout import FileId, Layout, file_id, is_sound, touch
from modelserve.artifacts.store import ArtifactStore
from modelserve.artifacts.transfer import DownloadBudget
from modelserve.errors import ArtifactCorrupt, BackendUnavailable

_log = logging.getLogger("modelserve")
ROUNDS: Final = 5  # find a bad blob, download, find it evicted, download, have it: more is no accident
PATIENCE_S: Final = 30.0  # for another process that fetches the same bytes and gets nowhere


class Task(NamedTuple):
    """Where to fetch from, and how long one fetch may take in all."""

    store: ArtifactStore
    effort: DownloadBudget


class Fetching:
    """Files by key."""

    def __init__(self, layout: Layout, of_this_process: OfThisProcess, eviction: Eviction) -> None:
        self._layout = layout
        self._of_this_process = of_this_process
        self._eviction = eviction

    def acquire(self, task: Task, key: str, limit: int) -> IO[bytes]:
        """Return the file of a key, open, held, and of bytes that were hashed. The caller has the lock of the key.

        It is at most ``limit`` bytes long.
        """
        path, arrived = self._layout.path(key), None
        for _ in range(ROUNDS):
            held = files.hold(path)
            if held is None:
                arrived = self._fill(task, key, limit)
            elif file_id(held) == arrived or is_sound(key, held):  # what has just arrived was hashed on its way
                touch(path)
                return held
            else:
                self._layout.set_aside(key, held)
        raise BackendUnavailable(BACKEND, f"{key} does not stay on the disk")

    def _fill(self, task: Task, key: str, limit: int) -> FileId | None:
        """Download, unless another process did so while this one waited for its turn; return what arrived."""
        waiting = partial(task.effort.check, key)
        with files.turn(self._layout.temp, key.replace("/", "-"), PATIENCE_S, waiting) as get_on:
            if self._layout.path(key).exists():
                return None
            files.sweep(self._layout.temp)
            self._eviction.lend_replica(key, 0 if blob.is_manifest(key) else limit)
            return self._download(task, key, limit, get_on)

    def _download(self, task: Task, key: str, limit: int, get_on: Callable[[], None]) -> FileId | None:
        """Fetch from the beginning once more what came out wrong; what is wrong again is so in the store."""
        try:
            return self._receive(task, key, limit, get_on)
        except ArtifactCorrupt as error:
            _log.warning("retrying: %s; it is fetched once more", error)
            return self._receive(task, key, limit, get_on)

    def _receive(self, task: Task, key: str, limit: int, get_on: Callable[[], None]) -> FileId | None:
        wanted = blob.digest_in(key)
        with self._of_this_process().counting(), files.draft(self._layout.temp) as draft:
            with contextlib.closing(task.store.read(key, task.effort)) as pieces:
                found, _ = files.copy(_watched(limit, pieces, key, get_on), draft)
            if found != wanted:
                raise ArtifactCorrupt(key, wanted, found)
            return file_id(draft) if files.add(draft, self._layout.path(key)) else None


def _watched(limit: int, pieces: Iterator[bytes], key: str, get_on: Callable[[], None]) -> Iterator[bytes]:
    """Pass the pieces on and show each, but do not fill the disk with what cannot be the artifact."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise ArtifactCorrupt(key, blob.digest_in(key), f"more than its {limit} bytes")
        get_on()
        yield piece
