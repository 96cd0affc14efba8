"""Figures of several processes in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelserve
from modelserve.errors import ConfigError
from modelserve.monitor.exposition import Figures
from modelserve.monitor.sharing import SharedFigures

PROCESS = """
import os, sys
from pathlib import Path
from modelserve.monitor.exposition import Figures
from modelserve.monitor.sharing import SharedFigures
shared = SharedFigures(Path(sys.argv[1]))
shared.write(Figures({"": {"hits_total": float(sys.argv[2])}}, {"ready": 1.0}))
print("written", flush=True)
if sys.argv[3] == "wait":
    sys.stdin.read()
os._exit(9)
"""


def figures(hits: float) -> Figures:
    return Figures({"": {"hits_total": hits}}, {"ready": 1.0})


def hits(found: list[Figures]) -> float:
    return sum(each.counts[""]["hits_total"] for each in found)


def start(folder: Path, count: int, then: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(modelserve.__file__).parents[1])}
    command = [sys.executable, "-c", PROCESS, str(folder), str(count), then]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_process_is_alive_until_it_ends_however_that_is(tmp_path: Path) -> None:
    """A living process is told from one that was killed, whose counts stay."""
    mine = SharedFigures(tmp_path)
    with start(tmp_path, 10, "wait") as other:
        everybody = mine.exchange(figures(1))
        assert (hits(everybody.alive), everybody.ended) == (11, [])
        other.kill()
    everybody = mine.exchange(figures(2))
    assert (hits(everybody.alive), hits(everybody.ended)) == (2, 10)
    mine.close(figures(3))
    last = SharedFigures(tmp_path)
    everybody = last.exchange(figures(0))
    assert hits(everybody.ended) == 13
    last.close(figures(0))


def test_many_ended_processes_become_one_file(tmp_path: Path) -> None:
    """However many workers come and go, the sum stays right and the folder small."""
    mine = SharedFigures(tmp_path)
    for i in range(60):
        SharedFigures(tmp_path).close(figures(1))
        assert hits(mine.exchange(figures(0)).ended) == i + 1
    assert len(list(tmp_path.iterdir())) < 25
    mine.close(figures(0))


def test_files_that_were_folded_but_not_removed_do_not_count_twice(tmp_path: Path) -> None:
    """A process that is killed while it folds leaves files that are known to be in the sum already."""
    mine = SharedFigures(tmp_path)
    for _ in range(17):
        SharedFigures(tmp_path).close(figures(1))
    left = {path.name: path.read_bytes() for path in tmp_path.glob("*-*.json")}
    mine.exchange(figures(0))
    for name, data in left.items():
        (tmp_path / name).write_bytes(data)
    assert hits(mine.exchange(figures(0)).ended) == 17
    mine.close(figures(0))


def test_what_is_none_of_ours_is_ignored(tmp_path: Path) -> None:
    """A damaged or foreign file costs its own figures and no more."""
    mine = SharedFigures(tmp_path)
    (tmp_path / "1-foreign.json").write_text("[1, 2", encoding="utf-8")
    (tmp_path / "2-foreign.json").write_text("[]", encoding="utf-8")
    assert hits(mine.exchange(figures(4)).alive) == 4
    mine.close(figures(4))


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """The setting that is wrong is named."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="metrics_dir"):
        SharedFigures(tmp_path / "file" / "folder")
