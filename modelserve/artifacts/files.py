"""Files that are written whole or not at all, and locks that die with their holder.

Correctness never rests on a lock: drafts have names of their own and take the final one in a single step. Where
locks do nothing, two processes may do the same work twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final

_CHUNK: Final = 1024 * 1024
_DRAFT: Final = re.compile(r"\.(?P<host>.*)-(?P<pid>[0-9]+)-[0-9a-f]{32}\.draft")
_TURN: Final = ".turn"
_LITTER_AGE_S: Final = 3600.0
_CLAIM_S: Final = 5.0  # far longer than anybody needs who removes a file
_POLL_S: Final = 0.02


def chunks_of(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        yield from chunks(file)


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Read an open file piece by piece, from where it stands."""
    while chunk := file.read(_CHUNK):
        yield chunk


def below(folder: Path) -> Iterator[Path]:
    """Give everything in a folder and its subfolders that is not a folder itself. Links are given, not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from below(path)
        else:
            yield path


def digest_of(pieces: Iterable[bytes]) -> tuple[str, int]:
    """Return the SHA-256 and the number of bytes."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


# -- writing -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def draft(folder: Path) -> Iterator[IO[bytes]]:
    """Open a new file in ``folder`` under a name that nobody else uses; that name is gone at the end."""
    _make_folder(folder)
    path = _draft_path(folder)
    with path.open("xb") as file:
        _lock(file.fileno(), fcntl.LOCK_SH)
        try:
            yield file
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """Make a new folder in ``folder``, likewise."""
    _make_folder(folder)
    path = _draft_path(folder)
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_SH)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def copy(pieces: Iterable[bytes], file: IO[bytes]) -> tuple[str, int]:
    """Write the pieces; return the SHA-256 and the number of bytes of what went in."""
    return digest_of(_written(pieces, file))


def replace(file: IO[bytes], target: Path) -> None:
    """Give a finished draft its final name, durably, in place of what has it now."""
    _make_durable(file)
    _make_folder(target.parent)
    Path(file.name).replace(target)
    _sync_folder(target.parent)


def add(file: IO[bytes], target: Path) -> bool:
    """Give a finished draft its final name, durably and read-only; return False when another was first.

    A file that is there is never replaced: whoever holds it may rely on the name.
    """
    os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o222)
    _make_durable(file)
    _make_folder(target.parent)
    try:
        os.link(file.name, target)
    except FileExistsError:
        return False
    _sync_folder(target.parent)
    return True


def _draft_path(folder: Path) -> Path:
    """Return a name that nobody else uses, and that tells who writes there."""
    return folder / f".{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex}.draft"


def _make_folder(folder: Path) -> None:
    """Make a folder that outlives a loss of power."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _written(pieces: Iterable[bytes], file: IO[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        file.write(piece)
        yield piece


def _make_durable(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- holding -----------------------------------------------------------------------------------------------


def hold(path: Path) -> IO[bytes] | None:
    """Open a file so that nobody can claim it until it is closed; None when it is not there.

    The operating system lets go when the process dies. The file is unbuffered: a buffer has a lock, which a fork could
    copy in the locked state.
    """
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    _lock(file.fileno(), fcntl.LOCK_SH, _CLAIM_S)
    if names(path, file):
        return file
    file.close()  # removed between opening and locking
    return None


def names(path: Path, file: IO[bytes]) -> bool:
    """Whether ``path`` still is the name of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def claim(path: Path, patience_s: float = 0.0) -> Iterator[bool]:
    """Give whether nobody holds the file or folder, now or in time; if so, nobody does until the end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _alone(descriptor, patience_s) as alone:
            yield alone
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def turn(
    folder: Path, name: str, patience_s: float, waiting: Callable[[], None] | None = None
) -> Iterator[Callable[[], None]]:
    """Let one process after the other in, as far as locks work, and give it the means to show that it gets on.

    Who waits goes in all the same when nothing was shown for ``patience_s``, or ``waiting``, called meanwhile, raises.
    """
    _make_folder(folder)
    path = folder / f".{name}{_TURN}"
    with path.open("ab") as file, _alone(file.fileno(), patience_s, waiting):
        try:
            yield lambda: os.utime(file.fileno())
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(descriptor: int, patience_s: float = 0.0, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Lock exclusively. Closing would not unlock what a fork copied meanwhile, so that is said in so many words."""
    try:
        yield _lock(descriptor, fcntl.LOCK_EX, patience_s, waiting)
    finally:
        _lock(descriptor, fcntl.LOCK_UN)


def _lock(descriptor: int, operation: int, patience_s: float = 0.0, waiting: Callable[[], None] | None = None) -> bool:
    """Return whether the lock was to be had in time. Where the filesystem has no locks, they are always to be had.

    Time counts from the last sign of life: the last change of the file's times.
    """
    seen, deadline = _life(descriptor), time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if _life(descriptor) != seen:
                seen, deadline = _life(descriptor), time.monotonic() + patience_s
            if time.monotonic() >= deadline:
                return False
            if waiting is not None:
                waiting()
            time.sleep(_POLL_S)
        except OSError:
            return True
        else:
            return True


def _life(descriptor: int) -> int:
    return os.fstat(descriptor).st_mtime_ns


# -- litter ------------------------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove what writers that died left behind."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError), claim(path) as free:
            if free and _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(path: Path) -> bool:
    """A process of this machine is known to be gone; of another one, an hour without a byte has to do."""
    name = _DRAFT.fullmatch(path.name)
    if name is None:
        return path.suffix == _TURN
    is_gone = name["host"] == os.uname().nodename and not _runs(int(name["pid"]))
    return is_gone or time.time() - path.stat().st_mtime > _LITTER_AGE_S


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
