"""The disk cache: artifacts of the store on the local disk, verified, shared by the processes of a machine.

Correctness rests on unique temporary files, digests and renames alone; the file locks only keep a leased blob from
being evicted by another process. Local paths derive from digests, never from names.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final, Self

from modelserve.artifacts import blob
from modelserve.artifacts.store import ArtifactStore
from modelserve.errors import ArtifactCorrupt, BackendUnavailable, LoadFailed
from modelserve.types import Artifact

_log = logging.getLogger("modelserve")
_ATTEMPTS: Final = 3
_QUARANTINED: Final = 8
_LITTER_AGE_S: Final = 3600.0


def default_cache_folder() -> Path:
    """Return the user's cache folder for artifacts."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "modelserve"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelserve"


class Lease:
    """Keeps an artifact on the disk while it is in use. ``path`` is its file, or its folder."""

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self.path = path
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the artifact be evicted. Safe to call twice."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class DiskCache:
    """Artifacts under ``folder``, at most ``max_bytes`` of them (None: no bound), least recently used out first.

    Thread-safe; any number of processes may share a folder. What a process finds on the disk is verified the first
    time that process uses it.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int | None = None) -> None:
        self._folder = Path(folder).absolute()
        self._max_bytes = max_bytes
        self._locks: dict[str, threading.Lock] = {}
        self._locks_lock = threading.Lock()
        self._verified: set[str] = set()
        self._temp = self._folder / "temp"
        with _disk_errors():
            self._temp.mkdir(parents=True, exist_ok=True)
            self._sweep_litter()

    def fetch(self, store: ArtifactStore, artifact: Artifact) -> Lease:
        """Return the artifact on the local disk, downloaded if need be, and verified.

        Raises ``ArtifactCorrupt`` when the store's bytes are not the registered ones, ``LoadFailed`` when it has
        none, ``BackendUnavailable`` when it does not answer or the disk is full.
        """
        blob.check_key(artifact.key)
        with self._lock_of(artifact.sha256), _disk_errors():
            path = self._path(artifact.key)
            size = None if blob.is_manifest(artifact.key) else artifact.size
            self._ensure(store, artifact.key, artifact.sha256, size)
            hold = _hold(path)
            try:
                if blob.is_manifest(artifact.key):
                    path = self._tree(store, artifact.sha256)
            except BaseException:
                hold.close()
                raise
        self.evict()
        return Lease(path, hold.close)

    def evict(self) -> None:
        """Remove what was used longest ago until ``max_bytes`` hold; what is leased stays."""
        if self._max_bytes is None:
            return
        blobs = sorted(self._blobs(), key=lambda each: each[1])
        total = sum(size for _, _, size in blobs)
        for path, _, size in blobs:
            if total <= self._max_bytes:
                return
            if self._remove_unless_held(path):
                total -= size

    # -- one blob ------------------------------------------------------------------------------------------

    def _ensure(self, store: ArtifactStore, key: str, sha256: str, size: int | None) -> None:
        path = self._path(key)
        if path.exists():
            if sha256 in self._verified or blob.digest_of(blob.chunks_of(path))[0] == sha256:
                self._verified.add(sha256)
                os.utime(path)
                return
            self._quarantine(path)
        self._download(store, key, sha256, size)
        self._verified.add(sha256)

    def _download(self, store: ArtifactStore, key: str, sha256: str, size: int | None) -> None:
        """Fetch into a file of our own; only bytes of the right digest ever take the final name."""
        for attempt in range(1, _ATTEMPTS + 1):
            with blob.staged(self._temp) as draft:
                try:
                    found, length = blob.write_durably(draft, store.read(key))
                except BackendUnavailable:
                    if attempt == _ATTEMPTS:
                        raise
                    continue
                if found == sha256:
                    blob.publish(draft, self._path(key))
                    return
            if size is None or length >= size or attempt == _ATTEMPTS:
                raise ArtifactCorrupt(key, sha256, found)
            _log.warning("artifact %s: got %d of %d bytes; fetching it again", key, length, size)

    def _quarantine(self, path: Path) -> None:
        """Set bad bytes aside for whoever asks what happened to them."""
        folder = self._folder / "quarantine"
        folder.mkdir(exist_ok=True)
        _log.error("artifact %s does not hash to its name; it is set aside and fetched again", path.name)
        path.replace(folder / f"{path.name}.{uuid.uuid4().hex}")
        kept = sorted(folder.iterdir(), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_QUARANTINED]:
            old.unlink(missing_ok=True)

    # -- folders -------------------------------------------------------------------------------------------

    def _tree(self, store: ArtifactStore, sha256: str) -> Path:
        """Build the folder of a manifest from hard links to its blobs; each is verified before."""
        entries = blob.decode_manifest(self._path(blob.manifest_key(sha256)).read_bytes())
        tree = self._folder / "trees" / "sha256" / sha256
        verified = f"tree:{sha256}"
        if verified in self._verified and tree.is_dir():
            return tree
        for entry in entries:
            with self._lock_of(entry.sha256):
                self._ensure(store, blob.blob_key(entry.sha256), entry.sha256, entry.size)
        draft = self._temp / f".{os.getpid()}-{uuid.uuid4().hex}.tree"
        try:
            for entry in entries:
                target = draft / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._path(blob.blob_key(entry.sha256)), target)
            self._put_tree(draft, tree)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._verified.add(verified)
        return tree

    def _put_tree(self, draft: Path, tree: Path) -> None:
        """Put the new tree in place of an older one: what an earlier process left was built from unchecked blobs."""
        tree.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            old = self._temp / f".{os.getpid()}-{uuid.uuid4().hex}.tree"
            with contextlib.suppress(FileNotFoundError):
                tree.rename(old)
            try:
                draft.rename(tree)
            except OSError:  # another process put its own there in between: as good as ours, but let ours be last
                continue
            else:
                return
            finally:
                shutil.rmtree(old, ignore_errors=True)
        if not tree.is_dir():
            raise BackendUnavailable("the artifact cache", f"the folder of {tree.name} could not be put in place")

    # -- housekeeping --------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._folder / key

    def _lock_of(self, sha256: str) -> threading.Lock:
        with self._locks_lock:
            return self._locks.setdefault(sha256, threading.Lock())

    def _blobs(self) -> Iterator[tuple[Path, float, int]]:
        for kind in ("blobs", "manifests"):
            for path in (self._folder / kind / "sha256").glob("*"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield path, stat.st_mtime, stat.st_size

    def _remove_unless_held(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            if path.parent.parent.name == "manifests":
                shutil.rmtree(self._folder / "trees" / "sha256" / path.name, ignore_errors=True)
                self._verified.discard(f"tree:{path.name}")
            return True
        return False

    def _sweep_litter(self) -> None:
        """Remove what processes that were killed left half-written."""
        for path in self._temp.iterdir():
            writer = path.name[1:].partition("-")[0]
            with contextlib.suppress(OSError):
                age = time.time() - path.stat().st_mtime
                if age > _LITTER_AGE_S or (writer.isdigit() and not _runs(int(writer))):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hold(path: Path) -> IO[bytes]:
    """Open a file and hold it shared; the operating system lets go when the process dies."""
    file = path.open("rb")
    with contextlib.suppress(OSError):  # a filesystem without locks: an evicted file that is open stays readable
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = error.strerror or type(error).__name__
        raise BackendUnavailable("the artifact cache", problem) from error
    except UnicodeError as error:
        raise LoadFailed("an artifact has a name this filesystem cannot hold") from error
