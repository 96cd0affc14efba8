"""Drafts, final names, locks and litter, on a real disk."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from modelserve.artifacts import files

OLD = time.time() - 7200


def test_a_draft_takes_its_name_whole(tmp_path: Path) -> None:
    """Before the end there is nothing under the final name, afterwards nothing under another."""
    target = tmp_path / "a" / "b" / "target"
    with files.draft(target.parent) as draft:
        assert files.copy([b"he", b"llo"], draft) == files.digest_of([b"hello"])
        assert not target.exists()
        files.replace(draft, target)
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert target.read_bytes() == b"hello"


@pytest.mark.parametrize("finish", [files.replace, files.add])
def test_bytes_are_on_the_disk_before_they_have_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish: Callable[[IO[bytes], Path], object]
) -> None:
    """A loss of power leaves the whole file or none: first the bytes are durable, then the name, then its folder."""
    target, synced = tmp_path / "target", []

    def fsync(descriptor: int) -> None:
        synced.append(("file" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "folder", target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with files.draft(tmp_path) as draft:
        files.copy([b"hello"], draft)
        finish(draft, target)
    assert synced == [("file", False), ("folder", True)]


def test_a_draft_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An exception takes the draft with it."""
    with pytest.raises(RuntimeError), files.draft(tmp_path), files.draft_folder(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_keeps_the_name(tmp_path: Path) -> None:
    """A file that others may hold is not replaced, and is read-only."""
    target = tmp_path / "target"
    for data, is_first in ((b"first", True), (b"second", False)):
        with files.draft(tmp_path) as draft:
            files.copy([data], draft)
            assert files.add(draft, target) is is_first
    assert target.read_bytes() == b"first"
    assert target.stat().st_mode & 0o222 == 0
    assert target.stat().st_nlink == 1


def test_a_held_file_cannot_be_claimed(tmp_path: Path) -> None:
    """A claim is had when the last holder has let go."""
    path = tmp_path / "file"
    path.touch()
    first, second = files.hold(path), files.hold(path)
    assert first is not None
    assert second is not None
    for held in (first, second):
        with files.claim(path) as free:
            assert not free
        held.close()
    with files.claim(path) as free:
        assert free


def test_a_file_that_is_not_there_is_not_held(tmp_path: Path) -> None:
    """There is nothing to hold where there is no file."""
    assert files.hold(tmp_path / "file") is None


def test_a_file_removed_before_it_was_locked_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on bytes without a name protects nothing."""
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(fcntl, "flock", lambda *_: path.unlink())
    assert files.hold(path) is None


def test_a_claimant_that_hangs_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock may save work; it may not stop it."""
    monkeypatch.setattr(files, "_CLAIM_S", 0.05)
    path = tmp_path / "file"
    path.touch()
    with files.claim(path) as free:
        assert free
        held = files.hold(path)
        assert held is not None
        held.close()


def test_a_claim_ends_even_if_a_fork_copied_it(tmp_path: Path) -> None:
    """A child that happens to be forked during a claim does not carry it on."""
    path = tmp_path / "file"
    path.touch()
    reading, writing = os.pipe()
    with files.claim(path):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with files.claim(path) as free:
            assert free
    finally:
        os.close(reading)
        os.close(writing)
        os.waitpid(child, 0)


def test_a_turn_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    """Whoever has waited long enough goes in beside the other, and no lock file stays."""
    with files.turn(tmp_path, "x", 0.0), files.turn(tmp_path, "x", 0.05):
        pass
    assert list(tmp_path.iterdir()) == []


def gone() -> int:
    """Return the id of a process that was."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("host", "pid", "age_s", "fate"),
    [
        ("here", "mine", 0, "stays"),
        ("here", "gone", 0, "goes"),
        ("elsewhere", "gone", 0, "stays"),
        ("elsewhere", "gone", 3590, "stays"),
        ("elsewhere", "gone", 3610, "goes"),
        ("here", "mine", 3610, "goes"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_litter_is_what_dead_writers_left(
    tmp_path: Path, host: str, pid: str, age_s: float, fate: str, kind: str
) -> None:
    """A writer here is known to be gone; one on another machine is thought gone after an hour without a byte."""
    node = os.uname().nodename if host == "here" else "other-host.example"
    path = tmp_path / f".{node}-{os.getpid() if pid == 'mine' else gone()}-{'0' * 32}.draft"
    path.mkdir() if kind == "folder" else path.touch()
    os.utime(path, times=(time.time() - age_s,) * 2)
    files.sweep(tmp_path)
    assert path.exists() is (fate == "stays")


def test_a_draft_in_work_is_not_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of its writer protects a draft, even where process ids say nothing."""
    monkeypatch.setattr(files, "_runs", lambda _: False)
    with files.draft(tmp_path) as draft, files.draft_folder(tmp_path) as folder:
        os.utime(draft.name, times=(OLD, OLD))
        os.utime(folder, times=(OLD, OLD))
        files.sweep(tmp_path)
        assert Path(draft.name).exists()
        assert folder.exists()


def test_only_our_own_litter_is_swept(tmp_path: Path) -> None:
    """What somebody else put into the folder is none of our business."""
    for name in (".gitignore", "notes", ".a-1-2.draft", "host-1.draft"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(OLD, OLD))
    files.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subfolder without permission is an error, not an empty one."""
    (tmp_path / "sub").mkdir()
    listed = Path.iterdir

    def iterdir(path: Path) -> object:
        if path.name == "sub":
            raise PermissionError
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError):
        list(files.below(tmp_path))
