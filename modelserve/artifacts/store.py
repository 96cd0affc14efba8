"""The artifact store: any fsspec URL, laid out by content.

A file lies at ``blobs/sha256/<hex>``; a folder is a manifest at ``manifests/sha256/<hex>`` that names its files,
each a blob. An object appears whole or not at all, and putting the same bytes again repairs what was damaged.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from modelserve import plugins
from modelserve.artifacts import blob, files, transfer
from modelserve.errors import BackendUnavailable, ConfigError, InvalidInput, LoadFailed, ModelServeError
from modelserve.ports import Interrupted, ObjectChanged, OpenObject
from modelserve.types import Artifact

_BACKEND: Final = "artifact store"
_S3: Final = ("s3", "s3a")
_DRIVER_RETRIES: Final = 1  # of s3fs, which would multiply those of its client: five requests at most for one write
_BLOCK: Final = 4 * 1024 * 1024
_S3_UPLOAD: Final = {"chunksize": 16 * 1024 * 1024, "max_concurrency": 4}  # else the driver holds 500 MB in memory
_NO_SUCH_KEY: Final = blob.blob_key("0" * 64)


class ArtifactStore:
    """Puts and reads artifacts under a root URL (``./artifacts``, ``s3://bucket/models``).

    ``storage_options`` go to the fsspec filesystem. The first use connects. Thread-safe, and usable on both sides of a
    fork. Raises ``ConfigError`` for a URL that no driver knows and ``MissingDependency`` when its driver is missing;
    every method raises ``BackendUnavailable`` when the store does not answer, or refuses.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        self._url = str(url)
        self._options = storage_options
        self._open()

    def put(self, path: str | Path, *, format: str) -> Artifact:  # noqa: A002  # the registry's word for it
        """Store a file or a folder; the digest of a folder is that of its manifest, its size that of its files.

        Raises ``InvalidInput`` for what cannot be read, and for a folder with anything in it but plain files.
        """
        path = Path(path)
        if path.is_dir():
            return self._put_folder(path, format)
        if not path.is_file():
            raise InvalidInput("model", f"there is no file or folder at {path}")
        with _readable(path):
            sha256, size = files.digest_of(files.chunks_of(path))
        self._put_file(path, sha256)
        return Artifact(key=blob.blob_key(sha256), sha256=sha256, size=size, format=format)

    def put_bytes(self, data: bytes, *, format: str) -> Artifact:  # noqa: A002
        """Store bytes."""
        sha256, size = files.digest_of([data])
        self._put_data(data, blob.blob_key(sha256))
        return Artifact(key=blob.blob_key(sha256), sha256=sha256, size=size, format=format)

    def read(self, key: str, effort: transfer.DownloadBudget | None = None) -> Generator[bytes, None, None]:
        """Read an object piece by piece. The bytes are not to be believed before their digest was checked.

        A connection that breaks is replaced and goes on where it broke, for as long as ``effort`` allows. Raises
        ``LoadFailed`` when there is no such object, and ``ArtifactCorrupt`` when it was replaced while it was read.
        """
        blob.digest_in(key)
        attempt = partial(self._attempt, key)
        with _translated(key):
            try:
                yield from transfer.whole(attempt, key, effort or transfer.DownloadBudget())
            except FileNotFoundError as error:
                raise LoadFailed(f"the artifact store has no {key}") from error

    def ping(self) -> None:
        """Raise ``BackendUnavailable`` unless the store answers."""
        fs = self._filesystem()
        bucket = self._root.partition("/")[0]
        with _translated(f"bucket {bucket}"):
            try:
                fs.info(f"{self._root}/{_NO_SUCH_KEY}")
            except PermissionError:
                pass  # the answer to who may read objects but not ask which there are
            except FileNotFoundError:
                if not fs.exists(bucket):
                    raise

    def close(self) -> None:
        """Close the connections of this process. Safe to call twice; later use opens new ones."""
        if self._pid != os.getpid():
            return
        if self._reader is not None:
            self._reader.close()
        client = getattr(self._fs, "_s3", None)  # asking politely, by the property, would connect
        if client is not None:
            self._fs.close_session(self._fs.loop, client)
            self._open()

    def __repr__(self) -> str:
        return f"ArtifactStore({self._fs.unstrip_protocol(self._root)!r})"

    # -- writing -------------------------------------------------------------------------------------------

    def _put_folder(self, folder: Path, artifact_format: str) -> Artifact:
        with _readable(folder):
            entries = blob.entries_of(folder)
        for entry in entries:
            self._put_file(folder / entry.path, entry.sha256)
        manifest = blob.encode_manifest(entries)
        sha256, _ = files.digest_of([manifest])
        self._put_data(manifest, blob.manifest_key(sha256))
        size = sum(entry.size for entry in entries)
        return Artifact(key=blob.manifest_key(sha256), sha256=sha256, size=size, format=artifact_format)

    def _put_file(self, path: Path, sha256: str) -> None:
        key = blob.blob_key(sha256)
        fs = self._filesystem()
        with _translated(key):
            if self._folder is not None:
                self._write(files.chunks_of(path), key)
            elif isinstance(fs, MemoryFileSystem):
                fs.pipe_file(f"{self._root}/{key}", path.read_bytes())
            else:
                fs.put_file(str(path), f"{self._root}/{key}", **(_S3_UPLOAD if fs.protocol == _S3 else {}))

    def _put_data(self, data: bytes, key: str) -> None:
        fs = self._filesystem()
        with _translated(key):
            if self._folder is not None:
                self._write([data], key)
            else:
                fs.pipe_file(f"{self._root}/{key}", data)

    def _write(self, pieces: Iterable[bytes], key: str) -> None:
        assert self._folder is not None
        target = self._folder / key
        files.sweep(target.parent)
        with files.draft(target.parent) as draft:
            found, _ = files.copy(pieces, draft)
            if found != blob.digest_in(key):
                raise InvalidInput("model", "the file changed while it was stored")
            files.replace(draft, target)

    # -- the driver ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        scheme = self._url.partition("://")[0]
        if scheme in _S3:
            plugins.require("s3fs")
        try:
            self._fs, root = url_to_fs(self._url, skip_instance_cache=True, **self._options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"artifacts: no fsspec driver serves {scheme}:// here") from error
        self._reader = plugins.object_reader(scheme, self._options)
        if scheme in _S3:
            self._fs.retries = _DRIVER_RETRIES
        self._root = root.rstrip("/")
        self._folder = Path(root) if isinstance(self._fs, LocalFileSystem) else None
        self._pid = os.getpid()

    def _filesystem(self) -> Any:
        """Return a filesystem that this process opened. The parent's is kept: its sockets are not ours to close."""
        if self._pid != os.getpid():
            self._inherited = (self._fs, self._reader)
            self._open()
        return self._fs

    @contextlib.contextmanager
    def _attempt(self, key: str, start: int, tag: str | None) -> Iterator[OpenObject]:
        """Open an object once, from a byte on, as :class:`modelserve.ports.ObjectReader` says."""
        path = f"{self._root}/{key}"
        fs = self._filesystem()
        if self._reader is not None:
            with self._reader.open(path, start, tag) as opened:
                yield opened
            return
        with _passing(), self._stream(fs, path) as stream:
            size, found = _identity(stream)
            stream.seek(start)
            yield OpenObject(found, size, files.chunks(stream))

    @staticmethod
    def _stream(fs: Any, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        if isinstance(fs, MemoryFileSystem):  # its open files are one object with one position
            return io.BytesIO(fs.cat_file(path))
        stream: contextlib.AbstractContextManager[IO[bytes]] = fs.open(path, "rb", block_size=_BLOCK)
        return stream


def _identity(stream: Any) -> tuple[int | None, str | None]:
    """Return how large an open file is, and what tells it from another under its name; None for what is unknown."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, AttributeError):  # not a file of this machine
        return getattr(stream, "size", None), None
    return status.st_size, f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}"


@contextlib.contextmanager
def _passing() -> Iterator[None]:
    """Take for passing what a driver does not say to be final: few attempts cost little where that is wrong."""
    try:
        yield
    except (ModelServeError, Interrupted, ObjectChanged, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise Interrupted(type(error).__name__) from error


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn a driver's exceptions into ours. Their text may hold hosts and keys; it stays in the cause."""
    try:
        yield
    except ModelServeError:
        raise
    except FileNotFoundError as error:
        raise BackendUnavailable(_BACKEND, f"no place for {what}") from error
    except PermissionError as error:
        raise BackendUnavailable(_BACKEND, f"access to {what} is denied") from error
    except Exception as error:
        raise BackendUnavailable(_BACKEND, f"{type(error).__name__} on {what}") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidInput("model", f"{path} cannot be read: {error.strerror}") from error
