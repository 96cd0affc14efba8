"""The disk cache: artifacts of the store on the local disk, verified, shared by the processes of a machine.

::

    blobs/sha256/<hex>        files, read-only, each under the digest of its bytes
    manifests/sha256/<hex>    what folders consist of
    trees/sha256/<hex>/       those folders, made of hard links to the blobs
    quarantine/               the last files that did not hash to their name
    temp/                     files and folders before they take their final name

A file takes its final name only after its bytes hashed to it, and is never replaced afterwards. Whoever uses it holds
a shared lock on it; eviction takes only what it can lock alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple, Self

from modelserve.artifacts import blob, files
from modelserve.artifacts.store import ArtifactStore
from modelserve.errors import ArtifactCorrupt, BackendUnavailable
from modelserve.types import Artifact

_log = logging.getLogger("modelserve")
_BACKEND: Final = "artifact cache"
_ATTEMPTS: Final = 3
_ROUNDS: Final = 5  # find a bad blob, download, find it evicted, download, have it: more is no accident
_PATIENCE_S: Final = 120.0  # for another process's download of the same bytes
_QUARANTINED: Final = 8
_MANIFEST_LIMIT: Final = 64 * 1024 * 1024


def default_cache_folder() -> Path:
    """Return the user's cache folder for artifacts."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "modelserve"
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "modelserve"


class Lease:
    """Keeps an artifact on the disk while it is in use. ``path`` is its file, or its folder."""

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self.path = path
        self._release = release

    def release(self) -> None:
        """Let the artifact be evicted. Safe to call twice."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class DiskCache:
    """Artifacts under ``folder``, at most ``max_bytes`` of them (None: no bound), least recently used out first.

    Thread-safe; any number of processes may share a folder, and a fork may copy the cache at any moment. What a
    process finds on the disk is verified the first time that process uses it.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int | None = None) -> None:
        self._folder = Path(folder).absolute()
        self._temp = self._folder / "temp"
        self._max_bytes = max_bytes
        self._process = _Process()
        with _disk_errors():
            self._temp.mkdir(parents=True, exist_ok=True)
            files.sweep(self._temp)

    def fetch(self, store: ArtifactStore, artifact: Artifact) -> Lease:
        """Return the artifact on the local disk, downloaded if need be, and verified.

        Raises ``ArtifactCorrupt`` when the store's bytes are not the registered ones, ``LoadFailed`` when it has none,
        and ``BackendUnavailable`` when it does not answer or the disk is full.
        """
        key = blob.key_of(artifact)
        limit = _MANIFEST_LIMIT if blob.is_manifest(key) else artifact.size
        process = self._of_this_process()
        with process.lock_of(key), _disk_errors():
            held = self._acquire(store, key, limit)
            try:
                path = self._tree(store, key, held) if blob.is_manifest(key) else self._folder / key
            except BaseException:
                held.close()
                raise
            process.lease(key)
        lease = Lease(path, lambda: process.release(key, held))
        self._evict()
        return lease

    # -- one blob ------------------------------------------------------------------------------------------

    def _acquire(self, store: ArtifactStore, key: str, limit: int) -> IO[bytes]:
        """Return the verified file of a key, open and held. The caller has the lock of the key."""
        path = self._folder / key
        for _ in range(_ROUNDS):
            held = files.hold(path)
            if held is None:
                self._fill(store, key, limit)
            elif self._is_sound(key, held):
                _touch(path)
                return held
            else:
                self._quarantine(path, held)
        raise BackendUnavailable(_BACKEND, f"{key} does not stay on the disk")

    def _is_sound(self, key: str, held: IO[bytes]) -> bool:
        """Whether the bytes hash to their name. Hashed once in each process, for as long as it is the same file."""
        verified = self._of_this_process().verified
        if verified.get(key) != _identity(held):
            if files.digest_of(files.chunks(held))[0] != blob.digest_in(key):
                return False
            verified[key] = _identity(held)
            held.seek(0)
        return True

    def _fill(self, store: ArtifactStore, key: str, limit: int) -> None:
        """Download, unless another process did so while this one waited for its turn."""
        with files.turn(self._temp, key.replace("/", "-"), _PATIENCE_S):
            if not (self._folder / key).exists():
                self._download(store, key, limit)

    def _download(self, store: ArtifactStore, key: str, limit: int) -> None:
        """Try again what broke off or came out wrong. What never began, the store's driver already retried."""
        for attempt in range(1, _ATTEMPTS + 1):
            with files.draft(self._temp) as draft:
                try:
                    self._receive(store, key, limit, draft)
                except (BackendUnavailable, ArtifactCorrupt) as error:
                    never_began = isinstance(error, BackendUnavailable) and draft.tell() == 0
                    if never_began or attempt == _ATTEMPTS:
                        raise
                    _log.warning("attempt %d of %d: %s", attempt, _ATTEMPTS, error)
                else:
                    if files.add(draft, self._folder / key):
                        self._of_this_process().verified[key] = _identity(draft)
                    return

    def _receive(self, store: ArtifactStore, key: str, limit: int, draft: IO[bytes]) -> None:
        wanted = blob.digest_in(key)
        with contextlib.closing(store.read(key)) as pieces:
            found, _ = files.copy(_at_most(limit, pieces, key), draft)
        if found != wanted:
            raise ArtifactCorrupt(key, wanted, found)

    def _quarantine(self, path: Path, held: IO[bytes]) -> None:
        """Set bad bytes aside for whoever asks what happened to them."""
        folder = self._folder / "quarantine"
        folder.mkdir(exist_ok=True)
        _log.error("%s does not hash to its name; it is set aside and fetched again", path)
        with held, contextlib.suppress(FileNotFoundError):
            if files.names(path, held):  # else another process was faster
                path.replace(folder / f"{time.time_ns():020}-{path.name}-{uuid.uuid4().hex[:8]}")
        for old in sorted(folder.iterdir())[:-_QUARANTINED]:
            old.unlink(missing_ok=True)

    # -- folders -------------------------------------------------------------------------------------------

    def _tree(self, store: ArtifactStore, key: str, manifest: IO[bytes]) -> Path:
        """Return the folder of a manifest, made of the verified blobs; what is there is kept only if it is the same."""
        entries = blob.decode_manifest(b"".join(files.chunks(manifest)))
        tree = self._tree_path(key)
        with files.draft_folder(self._temp) as draft:
            for entry in entries:
                self._link(store, entry, draft)
            self._put_tree(draft, tree, entries)
        return tree

    def _link(self, store: ArtifactStore, entry: blob.Entry, folder: Path) -> None:
        key, target = blob.blob_key(entry.sha256), folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._of_this_process().lock_of(key), self._acquire(store, key, entry.size):
            os.link(self._folder / key, target)

    def _put_tree(self, draft: Path, tree: Path, entries: Sequence[blob.Entry]) -> None:
        """Give the draft its final name. A folder that has it is removed only if it is not the same: others use it."""
        tree.parent.mkdir(parents=True, exist_ok=True)
        with files.turn(self._temp, f"trees-{tree.name}", _PATIENCE_S):
            for _ in range(_ROUNDS):
                with contextlib.suppress(OSError):  # no folder takes the name of another that has something in it
                    draft.rename(tree)
                    return
                if _same_tree(tree, draft, entries):
                    return
                self._remove_tree(tree)
        raise BackendUnavailable(_BACKEND, f"{tree} cannot be put in place")

    def _remove_tree(self, tree: Path) -> None:
        """Take the name away in one step, and then the files: nobody sees half a folder."""
        with contextlib.suppress(FileNotFoundError), files.draft_folder(self._temp) as grave:
            tree.rename(grave / tree.name)

    def _tree_path(self, key: str) -> Path:
        return self._folder / "trees" / "sha256" / blob.digest_in(key)

    # -- eviction ------------------------------------------------------------------------------------------

    def _evict(self) -> None:
        """Remove what was used longest ago until ``max_bytes`` hold. What cannot be removed fails no fetch."""
        if self._max_bytes is None:
            return
        found = sorted(self._on_disk(), key=lambda each: each.last_use_ns)
        excess = sum(each.size for each in found) - self._max_bytes
        for each in found:
            if excess <= 0:
                return
            if self._is_removed(each.key):
                excess -= each.size

    def _on_disk(self) -> Iterator[_OnDisk]:
        for kind in ("manifests", "blobs"):
            for path in (self._folder / kind / "sha256").glob("*"):
                key = f"{kind}/sha256/{path.name}"
                with contextlib.suppress(FileNotFoundError):
                    if blob.is_key(key):
                        yield _OnDisk(key, path.stat().st_size, path.stat().st_mtime_ns)

    def _is_removed(self, key: str) -> bool:
        """Remove a file unless it is in use. Afterwards it may be gone because another process removed it."""
        with self._of_this_process().unless_used(key) as unused:
            try:
                return unused and self._is_removed_alone(key)
            except FileNotFoundError:
                return True
            except OSError:
                _log.exception("the artifact cache cannot remove %s", key)
                return False

    def _is_removed_alone(self, key: str) -> bool:
        path = self._folder / key
        with files.claim(path) as free:
            if not free or path.stat().st_nlink > 1:  # a tree still has the bytes of a blob with two names
                return False
            if blob.is_manifest(key):
                self._remove_tree(self._tree_path(key))
            path.unlink()
            return True

    def _of_this_process(self) -> _Process:
        """Return what this process knows. After a fork that is nothing: locks and leases were the parent's."""
        if self._process.pid != os.getpid():
            self._process = _Process()
        return self._process


class _OnDisk(NamedTuple):
    key: str
    size: int
    last_use_ns: int


class _Process:
    """What one process knows of the cache: which files it verified, which keys it leases, a lock for each key."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.verified: dict[str, tuple[int, int]] = {}
        self._leases: Counter[str] = Counter()
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def lock_of(self, key: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())

    def lease(self, key: str) -> None:
        with self._guard:
            self._leases[key] += 1

    def release(self, key: str, held: IO[bytes]) -> None:
        if self.pid != os.getpid():  # a forked child lets go of its copy; the guard may have been copied locked
            held.close()
            return
        with self._guard:
            if not held.closed:
                self._leases[key] -= 1
                held.close()

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


def _same_tree(tree: Path, draft: Path, entries: Sequence[blob.Entry]) -> bool:
    """Whether two folders have the same files: under the same paths and, if not hard links of one, with the same bytes.

    Two processes that downloaded at once can have two files of the same bytes.
    """
    try:
        found = {path.relative_to(tree).as_posix() for path in files.below(tree)}
        return found == {entry.path for entry in entries} and all(
            (tree / path).samefile(draft / path) or files.digest_of(files.chunks_of(tree / path))[0] == sha256
            for path, sha256, _ in entries
        )
    except OSError:  # not there, or taken away by another process at this moment
        return False


def _at_most(limit: int, pieces: Iterator[bytes], key: str) -> Iterator[bytes]:
    """Pass the pieces on, but do not fill the disk with what cannot be the artifact."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise ArtifactCorrupt(key, blob.digest_in(key), f"more than its {limit} bytes")
        yield piece


def _identity(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _touch(path: Path) -> None:
    """Note the use. In nanoseconds of our own: the kernel's are those of its last tick."""
    now = time.time_ns()
    with contextlib.suppress(OSError):  # a file of another user, or a read-only volume
        os.utime(path, ns=(now, now))


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendUnavailable(_BACKEND, error.strerror or type(error).__name__) from error
