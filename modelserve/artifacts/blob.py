"""Bytes named by their SHA-256: keys, manifests of folders, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import orjson

from modelserve.errors import InvalidInput, LoadFailed

CHUNK: Final = 1024 * 1024
_KEY: Final = re.compile(r"(blobs|manifests)/sha256/([0-9a-f]{64})")


class Entry(NamedTuple):
    """One file of a folder artifact: its relative POSIX path, its digest and its size in bytes."""

    path: str
    sha256: str
    size: int


def blob_key(sha256: str) -> str:
    """Return where a file of that digest lies, in the store and in the cache."""
    return f"blobs/sha256/{sha256}"


def manifest_key(sha256: str) -> str:
    """Return where the manifest of a folder lies."""
    return f"manifests/sha256/{sha256}"


def check_key(key: str) -> str:
    """Return the key if it is one of ours; paths are made from nothing else."""
    if _KEY.fullmatch(key) is None:
        raise LoadFailed(f"{key[:100]!r} is no artifact key")
    return key


def is_manifest(key: str) -> bool:
    """Whether the key names a folder."""
    return key.startswith("manifests/")


def chunks_of(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest_of(chunks: Iterable[bytes]) -> tuple[str, int]:
    """Return the SHA-256 and the number of bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def entries_of(folder: Path) -> list[tuple[Path, Entry]]:
    """Return the files of a folder, sorted by path. Raises ``InvalidInput`` for anything that is not a plain file."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InvalidInput("model", f"{path.relative_to(folder)} is not a plain file; links are not followed")
        if path.is_file():
            sha256, size = digest_of(chunks_of(path))
            found.append((path, Entry(path.relative_to(folder).as_posix(), sha256, size)))
    if not found:
        raise InvalidInput("model", f"{folder.name} holds no file")
    return found


def encode_manifest(entries: Iterable[Entry]) -> bytes:
    """Return the canonical bytes of a manifest."""
    return orjson.dumps([entry._asdict() for entry in entries], option=orjson.OPT_SORT_KEYS)


def decode_manifest(data: bytes) -> list[Entry]:
    """Read a manifest. Raises ``LoadFailed`` for one that would reach outside its folder."""
    try:
        entries = [Entry(str(e["path"]), str(e["sha256"]), int(e["size"])) for e in orjson.loads(data)]
    except (ValueError, TypeError, KeyError) as error:
        raise LoadFailed("the artifact's manifest cannot be read") from error
    for entry in entries:
        check_key(blob_key(entry.sha256))
        _check_relative(entry.path)
    if len({entry.path for entry in entries}) != len(entries):
        raise LoadFailed("the artifact's manifest names a file twice")
    return entries


def _check_relative(path: str) -> None:
    parts = PurePosixPath(path).parts
    strange = not parts or PurePosixPath(path).is_absolute() or "\0" in path or "\\" in path
    if strange or ".." in parts or str(PurePosixPath(path)) != path:
        raise LoadFailed(f"the artifact's manifest names {path[:100]!r}, which is no path inside it")


def write_whole(target: Path, chunks: Iterable[bytes], *, temp: Path | None = None) -> tuple[str, int]:
    """Write a file so that it is never seen in part; return its SHA-256 and size.

    The bytes go to a uniquely named file in ``temp`` (default: beside the target, same filesystem), are hashed on
    the way, flushed to the disk, and then take the final name in one step.
    """
    with staged(temp or target.parent) as draft:
        found = write_durably(draft, chunks)
        publish(draft, target)
    return found


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a name that nobody else uses, and leave nothing there."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{os.getpid()}-{uuid.uuid4().hex}.part"
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def write_durably(path: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
    """Write and fsync a file; return the SHA-256 and size of what went in."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def publish(draft: Path, target: Path) -> None:
    """Give a finished file its final name, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
