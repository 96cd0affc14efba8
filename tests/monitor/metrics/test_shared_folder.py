"""Figures of several processes in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelserve
from modelserve.errors import ConfigError
from modelserve.monitor.metrics.exposition import KEPT_S, Figures
from modelserve.monitor.metrics.shared_folder import MetricsFolder

PROCESS = """
import os, sys
from pathlib import Path
from modelserve.monitor.metrics.exposition import Figures
from modelserve.monitor.metrics.shared_folder import MetricsFolder
shared = MetricsFolder(Path(sys.argv[1]))
shared.write(Figures({"": {"hits_total": float(sys.argv[2])}}, {"ready": 1.0}))
print("written", flush=True)
if sys.argv[3] == "wait":
    sys.stdin.read()
os._exit(9)
"""


def figures(hits: float) -> Figures:
    return Figures({"": {"hits_total": hits}}, {"ready": 1.0})


def hits(found: list[Figures]) -> float:
    return sum(each.counts.get("", {}).get("hits_total", 0.0) for each in found)


def leave(
    folder: Path, processes: int, *, version: str = "", age_s: float | None = None, unloaded: bool = False
) -> None:
    """Have so many processes come, count one each, and go."""
    for _ in range(processes):
        shared, counts = MetricsFolder(folder), {version: {"hits_total": 1.0}}
        shared.close(Figures({}, {}, counts) if unloaded else Figures(counts, {}))
        if age_s is not None:
            at = time.time() - age_s
            os.utime(folder / f"{shared._name}.json", (at, at))


@contextlib.contextmanager
def folding(folder: Path) -> Iterator[None]:
    """Hold what a process holds while it folds."""
    with (folder / "turn.lock").open("ab") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def too_many(*_: object) -> bytes:
    raise OSError(errno.EMFILE, "Too many open files")


def start(folder: Path, count: int, then: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(modelserve.__file__).parents[1])}
    command = [sys.executable, "-c", PROCESS, str(folder), str(count), then]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_process_is_alive_until_it_ends_however_that_is(tmp_path: Path) -> None:
    """A living process is told from one that was killed, whose counts stay."""
    mine = MetricsFolder(tmp_path)
    with start(tmp_path, 10, "wait") as other:
        everybody = mine.exchange(figures(1))
        assert (hits(everybody.alive), hits(everybody.ended)) == (10, 0)
        other.kill()
    everybody = mine.exchange(figures(2))
    assert (hits(everybody.alive), hits(everybody.ended)) == (0, 10)
    mine.close(figures(3))
    last = MetricsFolder(tmp_path)
    everybody = last.exchange(figures(0))
    assert hits(everybody.ended) == 13
    last.close(figures(0))


def test_many_ended_processes_become_one_file(tmp_path: Path) -> None:
    """However many workers come and go, the sum stays right and the folder small."""
    mine = MetricsFolder(tmp_path)
    for i in range(60):
        MetricsFolder(tmp_path).close(figures(1))
        assert hits(mine.exchange(figures(0)).ended) == i + 1
    assert len(list(tmp_path.iterdir())) < 25
    mine.close(figures(0))


def test_a_process_that_is_killed_while_it_folds_makes_nothing_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that it leaves are in the sum already, also for those that fold later; they remove them."""
    mine = MetricsFolder(tmp_path)
    leave(tmp_path, 20)
    left = {path.stem for path in tmp_path.glob("*-*.json")}

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        mine.exchange(figures(0))
    assert hits(mine.exchange(figures(0)).ended) == 20
    leave(tmp_path, 20)
    for _ in range(2):
        assert hits(mine.exchange(figures(0)).ended) == 40
    assert not left & {path.stem for path in tmp_path.glob("*-*.json")} - {mine._name}
    mine.close(figures(0))


def test_what_a_process_is_writing_is_nobodys_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not complete counts for nothing. Those of the dead are removed, those of the living are not."""
    mine, other = MetricsFolder(tmp_path), MetricsFolder(tmp_path)
    other.write(figures(10))

    def killed(draft: Path, _: Path) -> None:
        raise KeyboardInterrupt(draft)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        other.write(figures(11))
    everybody = mine.exchange(figures(0))
    assert (hits(everybody.alive), hits(everybody.ended)) == (10, 0)
    before = set(tmp_path.iterdir())
    third = MetricsFolder(tmp_path)
    assert before < set(tmp_path.iterdir())
    other._life.close()  # as when it is killed
    MetricsFolder(tmp_path).close(figures(0))
    (draft,) = before - set(tmp_path.iterdir())
    assert draft.suffix == ".draft"
    mine.close(figures(0))
    third.close(figures(0))


def test_nobody_waits_for_a_process_that_stands_still_while_it_folds(tmp_path: Path) -> None:
    """What there is can be read; only the folding is left until that process is well again."""
    mine = MetricsFolder(tmp_path)
    leave(tmp_path, 20)
    with folding(tmp_path):
        began = time.monotonic()
        assert hits(mine.exchange(figures(0)).ended) == 20
        assert time.monotonic() - began < 1
        assert len(list(tmp_path.glob("*-*.json"))) == 21
    mine.exchange(figures(0))
    assert len(list(tmp_path.glob("*-*.json"))) == 1
    mine.close(figures(0))


def test_files_that_are_folded_while_they_are_read_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads when another folds reads again."""
    mine, other = MetricsFolder(tmp_path), MetricsFolder(tmp_path)
    leave(tmp_path, 20)
    read = MetricsFolder._read_folded

    def folded_meanwhile(self: MetricsFolder) -> object:
        found = read(self)
        monkeypatch.undo()
        other.exchange(figures(0))
        return found

    monkeypatch.setattr(MetricsFolder, "_read_folded", folded_meanwhile)
    assert hits(mine.exchange(figures(0)).ended) == 20
    assert len(list(tmp_path.glob("*-*.json"))) == 2
    mine.close(figures(0))
    other.close(figures(0))


def test_a_process_that_cannot_be_looked_at_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files would be removed. There may just be too many open files in the process that asks."""
    mine, other = MetricsFolder(tmp_path), MetricsFolder(tmp_path)
    other.write(figures(10))

    monkeypatch.setattr(fcntl, "flock", too_many)
    assert hits(mine.exchange(figures(0)).ended) == 0
    mine.close(figures(0))
    other.close(figures(0))


def test_a_sum_that_cannot_be_read_now_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of ended processes are not lost to a moment in which a file cannot be opened."""
    mine = MetricsFolder(tmp_path)
    leave(tmp_path, 20)
    mine.exchange(figures(0))
    read = Path.read_bytes
    leave(tmp_path, 20)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: too_many() if path.name == "ended.json" else read(path))
        with pytest.raises(OSError, match="Too many"):
            mine.exchange(figures(0))
    assert hits(mine.exchange(figures(0)).ended) == 40
    mine.close(figures(0))


def test_versions_that_nobody_has_had_for_a_day_are_not_kept(tmp_path: Path) -> None:
    """The folded file does not grow with every version that ever was; what is loaded, or was today, stays."""
    mine = MetricsFolder(tmp_path)
    leave(tmp_path, 17, version="old", age_s=KEPT_S + 60)
    leave(tmp_path, 1, version="kept", age_s=KEPT_S + 60)
    leave(tmp_path, 1, version="recent", age_s=60)
    leave(tmp_path, 1, version="before", unloaded=True)
    has = Figures({"": {"hits_total": 0.0}, "kept": {"hits_total": 0.0}}, {})
    mine.exchange(has)
    folded, *others = mine.exchange(has).ended
    assert others == []
    assert set(folded.counts) == {"kept", "recent", "before"}
    mine.close(has)


FOREIGN = [
    "[1, 2",
    "[]",
    "null",
    '{"counts": [], "gauges": {}, "unloaded": {}}',
    '{"counts": {"": {"hits_total": "many"}}, "gauges": {}, "unloaded": {}}',
    '{"counts": {"": {"hits_total": null}}, "gauges": {}, "unloaded": {}}',
    '{"counts": {"": null}, "gauges": {}, "unloaded": {}}',
]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("name", ["1-foreign.json", "ended.json"])
def test_what_is_none_of_ours_is_ignored(tmp_path: Path, name: str, text: str) -> None:
    """A damaged or foreign file costs its own figures and no more."""
    mine = MetricsFolder(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    everybody = mine.exchange(figures(4))
    assert hits(everybody.alive + everybody.ended) == 0
    mine.close(figures(4))


def test_drafts_of_others_are_left_alone(tmp_path: Path) -> None:
    """A folder that is not the library's own loses nothing but what the library's processes left half-written."""
    theirs = [tmp_path / name for name in ("essay.draft", "novel.1.draft", "7-chapter.1.draft")]
    ours = tmp_path / "7-0123456789ab.9.draft"
    for path in (*theirs, ours):
        path.write_text("", encoding="utf-8")
    MetricsFolder(tmp_path).close(figures(1))
    assert all(path.exists() for path in theirs)
    assert not ours.exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """The setting that is wrong is named."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="metrics_dir"):
        MetricsFolder(tmp_path / "file" / "folder")
