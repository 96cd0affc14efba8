"""The disk cache: artifacts of the store on the local disk, hashed at every fetch, shared by a machine's processes.

A file takes its final name only after its bytes hashed to it, and is never written to afterwards. Disks and other
programs may change it all the same, so nothing remembers that it was sound. A lease holds a shared lock on it; eviction
takes only what it can lock alone.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Final, Self

from modelserve.artifacts import blob, files
from modelserve.artifacts.eviction import BACKEND, ROOM, Eviction
from modelserve.artifacts.fetching import Fetching, Task
from modelserve.artifacts.holdings import OfThisProcess
from modelserve.artifacts.layout import FileId, Layout, file_id
from modelserve.artifacts.pruning import CacheEntry, Examined
from modelserve.artifacts.store import ArtifactStore
from modelserve.artifacts.transfer import DOWNLOAD_LIMIT_S, DownloadBudget
from modelserve.artifacts.trees import Trees
from modelserve.artifacts.upkeep import Upkeep
from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.types import Artifact

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_MANIFEST_LIMIT: Final = 64 * 1024 * 1024


def default_cache_folder() -> Path:
    """Return the user's cache folder for artifacts."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "modelserve"
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "modelserve"


class Lease:
    """Keeps an artifact on the disk while it is in use. ``path`` is its file, or its folder.

    ``files`` tells the files that were hashed from any others that take their place later.
    """

    def __init__(self, path: Path, files: Sequence[FileId], release: Callable[[], None]) -> None:
        self.path = path
        self.files = files
        self._release = release

    def release(self) -> None:
        """Let the artifact be evicted. Safe to call twice."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _none() -> tuple[str, ...]:
    """Name no artifact."""
    return ()


class DiskCache:
    """Artifacts under ``folder``, at most ``max_bytes`` of them (None: no bound), least recently used out first.

    What ``spared()`` names, by its keys, goes only when there is nothing else to remove. Fetching one may take
    ``download_limit_s`` seconds, with all attempts.

    Thread-safe; any number of processes may share a folder, and a fork may copy the cache at any moment.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int | None = None,
        download_limit_s: float = DOWNLOAD_LIMIT_S,
        spared: Callable[[], Collection[str]] = _none,
    ) -> None:
        self._layout = Layout(Path(folder).absolute())
        self._download_limit_s = download_limit_s
        self._of_this_process = OfThisProcess()
        self._eviction = Eviction(self._layout, self._of_this_process, max_bytes=max_bytes, spared=spared)
        self._fetching = Fetching(self._layout, self._of_this_process, self._eviction)
        self._trees = Trees(self._layout, self._of_this_process, self._eviction, self._fetching)
        self._upkeep = Upkeep(self._layout, self._of_this_process, self._eviction)
        try:
            self._layout.temp.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache_dir: {self._layout.folder} cannot be used: {error.strerror}") from error
        with _disk_errors():
            files.sweep(self._layout.temp)

    def fetch(self, store: ArtifactStore, artifact: Artifact, given_up: threading.Event | None = None) -> Lease:
        """Return the artifact on the local disk, all of it hashed by this call; what is damaged or gone is downloaded.

        A download ends at its next piece once it is ``given_up``.
        Raises ``ArtifactCorrupt`` when the store's bytes are not the registered ones, ``LoadFailed`` when it has none,
        and ``BackendUnavailable`` when it does not answer, refuses, is too slow, or the disk has no room.
        """
        key = blob.key_of(artifact)
        process = self._of_this_process()
        task = Task(store, DownloadBudget(self._download_limit_s, wait=partial(_wait, process.closing, given_up)))
        with process.lock_of(key), _disk_errors():
            held = self._fetching.acquire(task, key, _MANIFEST_LIMIT if blob.is_manifest(key) else artifact.size)
            try:
                path = self._trees.make(task, key, held) if blob.is_manifest(key) else self._layout.path(key)
                found = _files_of(path, held)
            except BaseException:
                held.close()
                raise
            process.lease(key)
        lease = Lease(path, found, lambda: process.release(key, held))
        try:
            self._eviction.evict()
        except BaseException:
            lease.release()
            raise
        return lease

    @property
    def downloads(self) -> Mapping[str, int]:
        """How many downloads of this process were ``ok``, ``corrupt`` or ``failed``."""
        return self._of_this_process().downloads

    def close(self) -> None:
        """End the downloads that run, in whichever thread, with ``BackendUnavailable``; leases stay. No more begin."""
        self._of_this_process().closing.set()

    def entries(self) -> list[CacheEntry]:
        """Return what lies in the cache, by key. Whether something is in use shows only where locks work."""
        with _disk_errors():
            return self._upkeep.entries()

    def prune(
        self,
        *,
        max_bytes: int | None = None,
        used_before: dt.datetime | None = None,
        spare: bool = True,
        dry_run: bool = False,
    ) -> list[CacheEntry]:
        """Remove what is not in use, used longest ago first; return what was removed, or would be in a ``dry_run``.

        What is ``spared`` stays, unless ``spare`` is false. ``max_bytes`` ends it as soon as the rest takes no more
        than that, ``used_before`` (aware) spares what was used since.
        """
        with _disk_errors():
            return self._upkeep.prune(max_bytes=max_bytes, used_before=used_before, spare=spare, dry_run=dry_run)

    def verify(self) -> list[Examined]:
        """Hash everything; set aside the files that do not hash to their name, and remove the folders made of them."""
        with _disk_errors():
            return self._upkeep.verify()


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = error.strerror or type(error).__name__
        raise BackendUnavailable(BACKEND, f"{problem}; {ROOM}" if error.errno in _FULL else problem) from error


def _files_of(path: Path, held: IO[bytes]) -> tuple[FileId, ...]:
    """Return which files an artifact consists of: the one that is held, its folder, and what is in that."""
    parts = [path, *sorted(files.below(path))] if path.is_dir() else []
    return (file_id(held), *map(file_id, parts))


def _wait(closing: threading.Event, given_up: threading.Event | None, seconds: float) -> bool:
    return closing.wait(seconds) or (given_up is not None and given_up.is_set())
