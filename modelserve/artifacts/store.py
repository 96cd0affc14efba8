"""The artifact store: any fsspec URL, laid out by content.

A file lies at ``blobs/sha256/<hex>``; a folder is a manifest at ``manifests/sha256/<hex>`` that names its files,
each a blob. Nothing is ever changed in place, and putting the same bytes again repairs what was damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from modelserve.artifacts import blob
from modelserve.errors import BackendUnavailable, ConfigError, LoadFailed, MissingDependency
from modelserve.types import Artifact

_DRIVERS = {"s3": ("s3fs", "aws"), "s3a": ("s3fs", "aws")}


class ArtifactStore:
    """Puts and reads artifacts under a root URL (``./artifacts``, ``s3://bucket/models``).

    ``storage_options`` go to the fsspec filesystem. Raises ``BackendUnavailable`` when the store does not answer,
    ``LoadFailed`` when an object is not there.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        self.url = str(url)
        try:
            self._fs, root = url_to_fs(self.url, **storage_options)
        except ImportError as error:
            scheme = self.url.partition("://")[0]
            raise MissingDependency(*_DRIVERS.get(scheme, (f"the fsspec driver for {scheme}", "aws"))) from error
        except ValueError as error:
            raise ConfigError(f"artifacts: {error}") from error
        self._root = root.rstrip("/")
        self._local = Path(root) if isinstance(self._fs, LocalFileSystem) else None

    def put(self, path: Path, *, format: str) -> Artifact:  # noqa: A002
        """Store a file or a folder; the digest of a folder is that of its manifest, its size that of its files."""
        if path.is_dir():
            return self._put_folder(path, format)
        sha256, size = blob.digest_of(blob.chunks_of(path))
        self._put_file(path, blob.blob_key(sha256))
        return Artifact(key=blob.blob_key(sha256), sha256=sha256, size=size, format=format)

    def put_bytes(self, data: bytes, *, format: str) -> Artifact:  # noqa: A002
        """Store bytes."""
        sha256, size = blob.digest_of([data])
        self._put_data(data, blob.blob_key(sha256))
        return Artifact(key=blob.blob_key(sha256), sha256=sha256, size=size, format=format)

    def read(self, key: str) -> Iterator[bytes]:
        """Read an object piece by piece. What it says is not to be believed before its digest was checked."""
        path = f"{self._root}/{blob.check_key(key)}"
        with _translated(f"object {key}"), self._fs.open(path, "rb", block_size=4 * blob.CHUNK) as stream:
            while chunk := stream.read(blob.CHUNK):
                yield chunk

    def ping(self) -> None:
        """Raise ``BackendUnavailable`` unless the store answers."""
        with _translated("the root"), contextlib.suppress(FileNotFoundError):
            self._fs.ls(self._root, detail=False, refresh=True)

    def _put_folder(self, folder: Path, artifact_format: str) -> Artifact:
        files = blob.entries_of(folder)
        for path, entry in files:
            self._put_file(path, blob.blob_key(entry.sha256))
        manifest = blob.encode_manifest(entry for _, entry in files)
        sha256, _ = blob.digest_of([manifest])
        self._put_data(manifest, blob.manifest_key(sha256))
        size = sum(entry.size for _, entry in files)
        return Artifact(key=blob.manifest_key(sha256), sha256=sha256, size=size, format=artifact_format)

    def _put_file(self, path: Path, key: str) -> None:
        with _translated(f"object {key}"):
            if self._local is not None:
                blob.write_whole(self._local / key, blob.chunks_of(path))
            else:
                self._fs.put_file(str(path), f"{self._root}/{key}")

    def _put_data(self, data: bytes, key: str) -> None:
        with _translated(f"object {key}"):
            if self._local is not None:
                blob.write_whole(self._local / key, [data])
            else:
                self._fs.pipe_file(f"{self._root}/{key}", data)

    def __repr__(self) -> str:
        return f"ArtifactStore({fsspec.utils.stringify_path(self.url)!r})"


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn a driver's exceptions into ours; their text may hold hosts and keys, and stays in the cause."""
    try:
        yield
    except FileNotFoundError as error:
        raise LoadFailed(f"{what} is not in the artifact store") from error
    except PermissionError as error:
        raise LoadFailed(f"{what} may not be read from the artifact store") from error
    except (LoadFailed, GeneratorExit):
        raise
    except Exception as error:
        raise BackendUnavailable("the artifact store", f"{type(error).__name__} on {what}") from error
