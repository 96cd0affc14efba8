"""The disk cache: artifacts of the store on the local disk, verified, shared by the processes of a machine.

::

    blobs/sha256/<hex>        files, read-only, each under the digest of its bytes
    manifests/sha256/<hex>    what folders consist of
    trees/sha256/<hex>/       those folders, made of hard links to the blobs
    quarantine/               the last files that did not hash to their name
    temp/                     files and folders before they take their final name

A file takes its final name only after its bytes hashed to it, and is never written to afterwards. Disks and other
programs may change it all the same, so it is hashed at every fetch. A lease holds a shared lock on it; eviction takes
only what it can lock alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import errno
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Final, NamedTuple, Self

from modelserve.artifacts import blob, files
from modelserve.artifacts.pruning import CacheEntry, Examined, removable
from modelserve.artifacts.store import ArtifactStore
from modelserve.artifacts.transfer import DOWNLOAD_LIMIT_S, Effort
from modelserve.errors import ArtifactCorrupt, BackendUnavailable, ConfigError, LoadFailed
from modelserve.types import Artifact

_log = logging.getLogger("modelserve")
_BACKEND: Final = "artifact cache"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_ROUNDS: Final = 5  # find a bad blob, download, find it evicted, download, have it: more is no accident
_PATIENCE_S: Final = 30.0  # for another process that fetches the same bytes and gets nowhere
_QUARANTINED: Final = 8
_MANIFEST_LIMIT: Final = 64 * 1024 * 1024
_ROOM: Final = "make room with `modelserve cache prune`, or set cache_bytes so that what is not in use may go by itself"


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


class FileId(NamedTuple):
    """What tells a file from one that takes its name."""

    device: int
    inode: int


def _none() -> tuple[str, ...]:
    """Name no artifact."""
    return ()


class DiskCache:
    """Artifacts under ``folder``, at most ``max_bytes`` of them (None: no bound), least recently used out first.

    What ``spared()`` names, by its keys, goes only when there is nothing else to remove. Fetching one may take
    ``download_limit_s`` seconds, with all attempts.

    Thread-safe; any number of processes may share a folder, and a fork may copy the cache at any moment. What is found
    on the disk is hashed at every fetch.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int | None = None,
        download_limit_s: float = DOWNLOAD_LIMIT_S,
        spared: Callable[[], Collection[str]] = _none,
    ) -> None:
        self._folder = Path(folder).absolute()
        self._temp = self._folder / "temp"
        self._max_bytes = max_bytes
        self._download_limit_s = download_limit_s
        self._spared = spared
        self._process = _Process()
        try:
            self._temp.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache_dir: {self._folder} cannot be used: {error.strerror}") from error
        with self._disk_errors():
            files.sweep(self._temp)

    def fetch(self, store: ArtifactStore, artifact: Artifact, given_up: threading.Event | None = None) -> Lease:
        """Return the artifact on the local disk, downloaded if need be, and verified.

        A download ends at its next piece once it is ``given_up``.
        Raises ``ArtifactCorrupt`` when the store's bytes are not the registered ones, ``LoadFailed`` when it has none,
        and ``BackendUnavailable`` when it does not answer, refuses, is too slow, or the disk has no room.
        """
        key = blob.key_of(artifact)
        process = self._of_this_process()
        effort = Effort(self._download_limit_s, wait=partial(_wait, process.closing, given_up))
        task = _Task(store, effort)
        with process.lock_of(key), self._disk_errors():
            held = self._acquire(task, key, _MANIFEST_LIMIT if blob.is_manifest(key) else artifact.size)
            try:
                path = self._tree(task, key, held) if blob.is_manifest(key) else self._folder / key
                identity = _identity(path, held)
            except BaseException:
                held.close()
                raise
            process.lease(key)
        lease = Lease(path, identity, lambda: process.release(key, held))
        try:
            self._evict()
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

    # -- one blob ------------------------------------------------------------------------------------------

    def _acquire(self, task: _Task, key: str, limit: int) -> IO[bytes]:
        """Return the verified file of a key, open and held. The caller has the lock of the key."""
        path = self._folder / key
        for _ in range(_ROUNDS):
            held = files.hold(path)
            if held is None:
                self._fill(task, key, limit)
            elif _is_sound(key, held):
                _touch(path)
                return held
            else:
                self._quarantine(path, held)
        raise BackendUnavailable(_BACKEND, f"{key} does not stay on the disk")

    def _fill(self, task: _Task, key: str, limit: int) -> None:
        """Download, unless another process did so while this one waited for its turn."""
        waiting = partial(task.effort.check, key)
        with files.turn(self._temp, key.replace("/", "-"), _PATIENCE_S, waiting) as get_on:
            if not (self._folder / key).exists():
                files.sweep(self._temp)
                self._make_room(key, 0 if blob.is_manifest(key) else limit)
                self._download(task, key, limit, get_on)

    def _download(self, task: _Task, key: str, limit: int, get_on: Callable[[], None]) -> None:
        """Fetch from the beginning once more what came out wrong; what is wrong again is so in the store."""
        try:
            self._receive(task, key, limit, get_on)
        except ArtifactCorrupt as error:
            _log.warning("%s; it is fetched once more", error)
            self._receive(task, key, limit, get_on)

    def _receive(self, task: _Task, key: str, limit: int, get_on: Callable[[], None]) -> None:
        wanted = blob.digest_in(key)
        with self._of_this_process().counting(), files.draft(self._temp) as draft:
            with contextlib.closing(task.store.read(key, task.effort)) as pieces:
                found, _ = files.copy(_watched(limit, pieces, key, get_on), draft)
            if found != wanted:
                raise ArtifactCorrupt(key, wanted, found)
            files.add(draft, self._folder / key)

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

    def _tree(self, task: _Task, key: str, manifest: IO[bytes]) -> Path:
        """Return the folder of a manifest, made of the verified blobs; what is there is kept only if it is the same."""
        entries = blob.decode_manifest(b"".join(files.chunks(manifest)))
        tree = self._tree_path(key)
        missing = {
            each.sha256: each.size for each in entries if not (self._folder / blob.blob_key(each.sha256)).exists()
        }
        self._make_room(key, sum(missing.values()))
        with files.draft_folder(self._temp) as draft:
            for entry in entries:
                self._link(task, entry, draft)
            self._put_tree(draft, tree, entries)
        return tree

    def _link(self, task: _Task, entry: blob.Entry, folder: Path) -> None:
        key, target = blob.blob_key(entry.sha256), folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._of_this_process().lock_of(key), self._acquire(task, key, entry.size):
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
        if self._max_bytes is not None:
            found = list(self._on_disk())
            self._free(found, sum(each.size for each in found) - self._max_bytes)

    def _free(self, found: Sequence[_OnDisk], wanted: int) -> None:
        """Remove what is not in use, what is spared last and used longest ago first, until that many bytes are gone."""
        if wanted <= 0:
            return
        spared = self._spared()
        for each in sorted(found, key=lambda each: (each.key in spared, each.last_use_ns)):
            if wanted <= 0:
                return
            if self._is_removed(each.key):
                wanted -= each.size

    def _make_room(self, key: str, size: int) -> None:
        """See to it that the disk can take so many bytes more. Only a cache that may evict does so for it.

        Raises ``BackendUnavailable`` that says how much is missing: before a download, which would end with the disk
        full to the last byte for everybody.
        """
        missing = size - self._free_bytes()
        if missing > 0 and self._max_bytes is not None:
            self._free(list(self._on_disk()), missing)
            missing = size - self._free_bytes()
        if missing > 0:
            told = f"{key} takes {size} bytes, which is {missing} more than the disk has free; {_ROOM}"
            raise BackendUnavailable(_BACKEND, told)

    def _free_bytes(self) -> int:
        self._temp.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._temp).free

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise BackendUnavailable(_BACKEND, f"{problem}; {_ROOM}" if error.errno in _FULL else problem) from error

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

    # -- looking after it ----------------------------------------------------------------------------------

    def entries(self) -> list[CacheEntry]:
        """Return what lies in the cache, by key. Whether something is in use shows only where locks work."""
        with self._disk_errors():
            parts = {each.key: self._parts(each.key) for each in self._on_disk() if blob.is_manifest(each.key)}
            used = {each.key for each in self._on_disk() if self._is_used(each.key)}
            used |= {part for key in used for part in parts.get(key, ())}
            found = [
                CacheEntry(
                    key=each.key,
                    kind="folder" if blob.is_manifest(each.key) else "file",
                    size=each.size,
                    last_use=_moment(each.last_use_ns),
                    in_use=each.key in used,
                    parts=parts.get(each.key, ()),
                )
                for each in self._on_disk()
            ]
            return sorted([*found, *self._set_aside()], key=lambda each: each.key)

    def prune(
        self,
        *,
        max_bytes: int | None = None,
        used_before: dt.datetime | None = None,
        spare: bool = True,
        dry_run: bool = False,
    ) -> list[CacheEntry]:
        """Remove what is not in use, used longest ago first; return what was removed, or would be in a ``dry_run``.

        What is ``spared`` stays, unless told not to ``spare`` it. ``max_bytes`` ends it as soon as the rest takes no
        more than that, ``used_before`` (aware) spares what was used since.
        """
        spared = self._spared() if spare else ()
        entries = [dataclasses.replace(each, in_use=each.in_use or each.key in spared) for each in self.entries()]
        planned = removable(entries, max_bytes=max_bytes, used_before=used_before)
        with self._disk_errors():
            return planned if dry_run else [each for each in planned if self._is_pruned(each)]

    def verify(self) -> list[Examined]:
        """Hash everything; set aside the files that do not hash to their name, and remove the folders made of them."""
        with self._disk_errors():
            found = [self._examined(each) for each in self._on_disk()]
            trees = [self._examined_tree(path) for path in (self._folder / "trees" / "sha256").glob("*")]
        return sorted([each for each in [*found, *trees] if each is not None], key=lambda each: each.key)

    def _parts(self, key: str) -> tuple[str, ...]:
        try:
            entries = blob.decode_manifest((self._folder / key).read_bytes())
        except (OSError, LoadFailed):  # gone, or damaged: then it holds nothing
            return ()
        return tuple(sorted({blob.blob_key(entry.sha256) for entry in entries}))

    def _is_used(self, key: str) -> bool:
        try:
            with self._of_this_process().unless_used(key) as unused, files.claim(self._folder / key) as free:
                return not (unused and free)
        except FileNotFoundError:
            return False
        except OSError:  # who may not even open it does not know
            return True

    def _set_aside(self) -> Iterator[CacheEntry]:
        for path in (self._folder / "quarantine").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield CacheEntry(
                    key=f"quarantine/{path.name}",
                    kind="quarantined",
                    size=status.st_size,
                    last_use=_moment(status.st_mtime_ns),
                    in_use=False,
                )

    def _is_pruned(self, entry: CacheEntry) -> bool:
        if entry.kind != "quarantined":
            return self._is_removed(entry.key)
        (self._folder / entry.key).unlink(missing_ok=True)
        return True

    def _examined(self, found: _OnDisk) -> Examined | None:
        path = self._folder / found.key
        held = files.hold(path)
        if held is None:
            return None
        sound = _is_sound(found.key, held)
        held.close() if sound else self._quarantine(path, held)
        return Examined(key=found.key, size=found.size, sound=sound)

    def _examined_tree(self, tree: Path) -> Examined | None:
        """A file of a folder is a second name of one that was examined, or is hashed by itself."""
        manifest = self._folder / blob.manifest_key(tree.name)
        try:
            entries = blob.decode_manifest(manifest.read_bytes())
            size = sum(entry.size for entry in entries)
            sound = self._is_tree_of(tree, entries)
        except (OSError, LoadFailed):
            size, sound = 0, False
        if not sound:
            self._remove_tree(tree)
        return Examined(key=f"trees/sha256/{tree.name}", size=size, sound=sound)

    def _is_tree_of(self, tree: Path, entries: Sequence[blob.Entry]) -> bool:
        found = {path.relative_to(tree).as_posix() for path in files.below(tree)}
        return found == {entry.path for entry in entries} and all(self._is_part(tree, entry) for entry in entries)

    def _is_part(self, tree: Path, entry: blob.Entry) -> bool:
        path, examined = tree / entry.path, self._folder / blob.blob_key(entry.sha256)
        if examined.exists() and path.samefile(examined):
            return True
        return files.digest_of(files.chunks_of(path))[0] == entry.sha256

    def _of_this_process(self) -> _Process:
        """Return what this process knows. After a fork that is nothing: locks and leases were the parent's."""
        if self._process.pid != os.getpid():
            self._process = _Process()
        return self._process


class _Task(NamedTuple):
    """Where to fetch from, and how long one fetch may take in all."""

    store: ArtifactStore
    effort: Effort


class _OnDisk(NamedTuple):
    key: str
    size: int
    last_use_ns: int


class _Process:
    """What one process knows of the cache: which keys it leases, a lock for each key, how its downloads ended."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closing = threading.Event()
        self.downloads: Counter[str] = Counter()
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


def _watched(limit: int, pieces: Iterator[bytes], key: str, get_on: Callable[[], None]) -> Iterator[bytes]:
    """Pass the pieces on and tell of each, but do not fill the disk with what cannot be the artifact."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise ArtifactCorrupt(key, blob.digest_in(key), f"more than its {limit} bytes")
        get_on()
        yield piece


def _moment(time_ns: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(time_ns / 1e9, tz=dt.UTC)


def _wait(closing: threading.Event, given_up: threading.Event | None, seconds: float) -> bool:
    return closing.wait(seconds) or (given_up is not None and given_up.is_set())


def _is_sound(key: str, held: IO[bytes]) -> bool:
    """Whether the bytes of an open file hash to their name."""
    sound = files.digest_of(files.chunks(held))[0] == blob.digest_in(key)
    held.seek(0)
    return sound


def _identity(path: Path, held: IO[bytes]) -> tuple[FileId, ...]:
    """Return which files an artifact consists of: the one that is held, its folder, and those in that."""
    parts = [path, *sorted(files.below(path))] if path.is_dir() else ()
    found = [os.fstat(held.fileno()), *(part.stat() for part in parts)]
    return tuple(FileId(each.st_dev, each.st_ino) for each in found)


def _touch(path: Path) -> None:
    """Note the use. In nanoseconds of our own: the kernel's are those of its last tick."""
    now = time.time_ns()
    with contextlib.suppress(OSError):  # a file of another user, or a read-only volume
        os.utime(path, ns=(now, now))
