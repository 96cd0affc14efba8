"""What bytes are called: keys made from SHA-256 digests, and the manifests of folders. Nothing here writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import orjson

from modelserve.artifacts import files
from modelserve.errors import ArtifactCorrupt, InvalidInput, LoadFailed
from modelserve.types import Artifact

_KEY: Final = re.compile(r"(blobs|manifests)/sha256/[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Entry(NamedTuple):
    """One file of a folder artifact: its relative POSIX path, its digest and its size in bytes."""

    path: str
    sha256: str
    size: int


# -- keys --------------------------------------------------------------------------------------------------


def blob_key(sha256: str) -> str:
    """Return where a file of that digest lies, in the store and in the cache."""
    return f"blobs/sha256/{sha256}"


def manifest_key(sha256: str) -> str:
    """Return where the manifest of a folder lies."""
    return f"manifests/sha256/{sha256}"


def is_key(text: str) -> bool:
    """Whether this is the key of a file or of a folder."""
    return _KEY.fullmatch(text) is not None


def digest_in(key: str) -> str:
    """Return the digest that a key ends with.

    Raises ``LoadFailed`` for what is no key; paths are made from keys alone.
    """
    if not is_key(key):
        raise LoadFailed(f"{key[:100]!r} is no artifact key")
    return key.rpartition("/")[2]


def key_of(artifact: Artifact) -> str:
    """Return the key of an artifact. Raises ``ArtifactCorrupt`` when it is not the key of the registered digest."""
    found = digest_in(artifact.key)
    if found != artifact.sha256:
        raise ArtifactCorrupt(artifact.key, artifact.sha256, found)
    return artifact.key


def is_manifest(key: str) -> bool:
    """Whether the key names a folder."""
    return key.startswith("manifests/")


# -- manifests ---------------------------------------------------------------------------------------------


def entries_of(folder: Path) -> list[Entry]:
    """Return the files of a folder, sorted by path.

    Raises ``InvalidInput`` for links, for anything else that is not a plain file or folder, and for an empty folder.
    """
    entries = [_entry(folder, path) for path in files.below(folder)]
    if not entries:
        raise InvalidInput("model", f"{folder.name} holds no file")
    return sorted(entries)


def encode_manifest(entries: Iterable[Entry]) -> bytes:
    """Return the canonical bytes of a manifest."""
    return orjson.dumps([entry._asdict() for entry in entries], option=orjson.OPT_SORT_KEYS)


def decode_manifest(data: bytes) -> list[Entry]:
    """Read a manifest. Raises ``LoadFailed`` for one that is malformed or would reach outside its folder."""
    try:
        entries = [_checked(**record) for record in orjson.loads(data)]
    except (ValueError, TypeError) as error:
        raise LoadFailed("the artifact's manifest cannot be read") from error
    paths = {entry.path for entry in entries}
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    if len(paths) != len(entries) or paths & folders:
        raise LoadFailed("the artifact's manifest names a path twice")
    return entries


def _entry(folder: Path, path: Path) -> Entry:
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not path.is_file():
        raise InvalidInput("model", f"{name!r} is not a plain file; links are not followed")
    if not _stays_inside(name):
        raise InvalidInput("model", f"{name!r} is no portable file name")
    return Entry(name, *files.digest_of(files.chunks_of(path)))


def _checked(path: Any, sha256: Any, size: Any) -> Entry:
    if not (isinstance(path, str) and isinstance(sha256, str) and type(size) is int and size >= 0):
        raise TypeError("an entry is a path, a digest and a size")
    if not _DIGEST.fullmatch(sha256):
        raise LoadFailed(f"the artifact's manifest names {sha256[:100]!r}, which is no digest")
    if not _stays_inside(path):
        raise LoadFailed(f"the artifact's manifest names {path[:100]!r}, which is no path inside it")
    return Entry(path, sha256, size)


def _stays_inside(path: str) -> bool:
    """Whether a path is relative, normal (no ``..``, no ``a//b``) and the same on every system."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        return False
    return path.isprintable() and "\\" not in path
