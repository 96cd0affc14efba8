"""Where things lie in the folder of a disk cache, and what can be said of a thing there by itself.

::

    blobs/sha256/<hex>        files, read-only, each under the digest of its bytes
    manifests/sha256/<hex>    what folders consist of
    trees/sha256/<hex>/       those folders, made of hard links to the blobs
    quarantine/               the last files that did not hash to their name
    temp/                     files and folders before they take their final name
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple

from modelserve.artifacts import blob, files

_log = logging.getLogger("modelserve")
_QUARANTINED: Final = 8


class FileId(NamedTuple):
    """What tells a file from another that takes its name."""

    device: int
    inode: int


class OnDisk(NamedTuple):
    """A file under its final name."""

    key: str
    size: int
    last_use_ns: int


class Layout:
    """The names under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temp = folder / "temp"
        self.quarantine = folder / "quarantine"
        self.trees = folder / "trees" / "sha256"

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / key

    def tree(self, manifest: str) -> Path:
        """Return the folder of a manifest's key."""
        return self.trees / blob.digest_in(manifest)

    def on_disk(self) -> Iterator[OnDisk]:
        """Give the files and manifests that are there."""
        for kind in ("manifests", "blobs"):
            for path in (self.folder / kind / "sha256").glob("*"):
                key = f"{kind}/sha256/{path.name}"
                with contextlib.suppress(FileNotFoundError):
                    if blob.is_key(key):
                        yield OnDisk(key, path.stat().st_size, path.stat().st_mtime_ns)

    def set_aside(self, key: str, held: IO[bytes]) -> None:
        """Move an open file whose bytes are bad into the quarantine, and close it. The oldest ones there go."""
        path = self.path(key)
        self.quarantine.mkdir(exist_ok=True)
        _log.error("damaged: %s does not hash to its name; it is set aside and fetched again", path)
        with held, contextlib.suppress(FileNotFoundError):
            if files.names(path, held):  # else another process was faster
                path.replace(self.quarantine / f"{time.time_ns():020}-{path.name}-{uuid.uuid4().hex[:8]}")
        for old in sorted(self.quarantine.iterdir())[:-_QUARANTINED]:
            old.unlink(missing_ok=True)

    def remove_tree(self, tree: Path) -> None:
        """Take the name away in one step, and then the files: nothing sees half a folder."""
        with contextlib.suppress(FileNotFoundError), files.draft_folder(self.temp) as grave:
            tree.rename(grave / tree.name)


def is_sound(key: str, held: IO[bytes]) -> bool:
    """Whether the bytes of an open file hash to their name."""
    sound = files.digest_of(files.chunks(held))[0] == blob.digest_in(key)
    held.seek(0)
    return sound


def is_tree(tree: Path, entries: Sequence[blob.Entry], originals: dict[str, Path]) -> bool:
    """Whether a folder has the files of its manifest and no others.

    A file of it is a second name of the sound one that ``originals`` has for its path, or is hashed by itself.
    """
    found = {path.relative_to(tree).as_posix() for path in files.below(tree)}
    return found == {entry.path for entry in entries} and all(
        _is_file_of(tree / path, originals[path], sha256) for path, sha256, _ in entries
    )


def _is_file_of(path: Path, original: Path, sha256: str) -> bool:
    if original.exists() and path.samefile(original):
        return True
    return files.digest_of(files.chunks_of(path))[0] == sha256


def file_id(file: IO[bytes] | Path) -> FileId:
    """Tell which file it is."""
    status = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    return FileId(status.st_dev, status.st_ino)


def touch(path: Path) -> None:
    """Note the use. In nanoseconds of our own: the kernel's are those of its last tick."""
    now = time.time_ns()
    with contextlib.suppress(OSError):  # a file of another user, or a read-only volume
        os.utime(path, ns=(now, now))
