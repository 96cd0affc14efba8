"""What was applied last, on the disk: whole or not at all, the newest, and never believed when it is odd."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.serving.snapshots import Snapshots
from modelserve.types import Artifact, DeploymentState, ModelVersion

URL = "postgresql+psycopg://app:***@db/models"
TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def artifact(digit: str) -> Artifact:
    return Artifact(key=f"blobs/sha256/{digit * 64}", sha256=digit * 64, size=7, format="skops")


def version(number: int, **changes: Any) -> ModelVersion:
    made = ModelVersion(
        id=number,
        model_name="m",
        version=str(number),
        framework="sklearn",
        artifact=artifact("a"),
        signature={"inputs": [{"name": "x", "dtype": "float64", "shape": [1], "nullable": False}], "outputs": None},
        load_options={"method": "predict", "trusted": ["a.B"]},
        example=artifact("b"),
        conversion=None,
        metrics={"auc": 0.5, "nothing": None},
        tags={"team": "ä"},
        status="production",
        created_at=TIME,
    )
    return dataclasses.replace(made, **changes)


def state(generation: int, model_name: str = "m") -> DeploymentState:
    made = version(generation, model_name=model_name)
    previous = version(generation - 1, model_name=model_name, artifact=artifact("c"), example=None)
    return DeploymentState(model_name=model_name, generation=generation, production=made, previous=previous)


class Clock:
    def __init__(self) -> None:
        self.now = TIME

    def __call__(self) -> dt.datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    """A clock that the test sets."""
    return Clock()


@pytest.fixture
def snapshots(tmp_path: Path, clock: Clock) -> Snapshots:
    """The snapshots of one registry."""
    return Snapshots(tmp_path, URL, now=clock)


def the_file(snapshots: Snapshots) -> Path:
    (path,) = snapshots._folder.glob("*.json")
    return path


def test_what_was_saved_is_read_again(snapshots: Snapshots, tmp_path: Path) -> None:
    """Every field of both versions comes back as it was, in another process too, and for that registry alone."""
    assert snapshots.load() == {}
    assert snapshots.save(state(5))
    assert snapshots.save(state(2, "M"))
    found = Snapshots(tmp_path, URL).load()
    assert {name: each.state for name, each in found.items()} == {"m": state(5), "M": state(2, "M")}
    assert found["m"].saved_at == TIME
    assert Snapshots(tmp_path, "sqlite:///other.db").load() == {}
    assert list((tmp_path / "temp").iterdir()) == []


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=50)
@given(document=_JSON, created=st.datetimes(timezones=st.just(dt.UTC)))
def test_any_document_survives(tmp_path_factory: pytest.TempPathFactory, document: Any, created: dt.datetime) -> None:
    """Signatures, options and metrics are JSON and come back as the JSON they were."""
    snapshots = Snapshots(tmp_path_factory.mktemp("cache"), URL)
    made = version(1, signature=document, metrics={"any": document}, created_at=created)
    kept = DeploymentState(model_name="m", generation=1, production=made, previous=None)
    assert snapshots.save(kept)
    assert snapshots.load()["m"].state == kept


def test_a_version_that_is_only_tried_is_not_noted(snapshots: Snapshots) -> None:
    """What a start without the registry serves was in production."""
    live = state(3)
    assert snapshots.save(live)
    assert snapshots.save(dataclasses.replace(live, generation=4, production=version(9, status="staging")))
    assert snapshots.load()["m"].state == live


def test_the_higher_generation_of_a_rival_stays(snapshots: Snapshots, clock: Clock) -> None:
    """A process that is a moment behind does not undo what another one has applied."""
    snapshots.save(state(6))
    clock.wait(59)
    assert snapshots.save(state(5))
    assert snapshots.load()["m"].state.generation == 6
    assert snapshots.save(state(7))
    assert snapshots.load()["m"].state.generation == 7


@pytest.mark.parametrize("seconds", [61, -61])
def test_a_registry_that_has_gone_back_replaces_what_was_kept(
    snapshots: Snapshots, clock: Clock, seconds: float
) -> None:
    """A higher generation that was there before belongs to a registry that is no more, whatever the clock did."""
    snapshots.save(state(50))
    clock.wait(seconds)
    snapshots.save(state(3))
    assert snapshots.load()["m"].state.generation == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00\xff garbage",
        lambda text: "[" * 100_000,
        lambda text: json.dumps(json.loads(text) | {"schema_version": 2}),
        lambda text: json.dumps(json.loads(text) | {"later": 1}),
        lambda text: json.dumps(json.loads(text) | {"saved_at": "2026-01-01T00:00:00"}),
        lambda text: json.dumps(json.loads(text) | {"state": None}),
        lambda text: text.replace('"model_name":"m"', '"model_name":"n"'),
        lambda text: text + " " * (16 * 1024 * 1024),
    ],
    ids=["empty", "cut", "garbage", "deep", "newer", "unknown", "naive time", "no state", "other model", "large"],
)
def test_what_is_odd_is_ignored_told_once_and_replaced(
    snapshots: Snapshots, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is no snapshot is as if it was not there; the next save puts it right."""
    snapshots.save(state(5))
    path = the_file(snapshots)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert snapshots.load() == snapshots.load() == {}
    assert snapshots.artifact_keys() == set()
    assert [record.message.count("is ignored") for record in caplog.records] == [1]
    snapshots.save(state(4))
    assert snapshots.load()["m"].state == state(4)


def test_a_pickle_is_not_opened(snapshots: Snapshots, tmp_path: Path) -> None:
    """Nothing on the disk turns into code."""
    snapshots.save(state(5))
    mark = tmp_path / "mark"
    the_file(snapshots).write_bytes(b"cbuiltins\nopen\n(S'" + str(mark).encode() + b"'\nS'w'\ntR.")
    assert snapshots.load() == {}
    assert not mark.exists()


def test_a_folder_that_cannot_be_written_is_told_once_and_harms_nothing(
    snapshots: Snapshots, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saving says that it failed, and succeeds when the folder is whole again."""
    (tmp_path / "applied").write_text("in the way")
    assert not snapshots.save(state(1))
    assert not snapshots.save(state(2))
    assert snapshots.load() == {}
    assert [record.message.count("failed to save") for record in caplog.records] == [1]
    (tmp_path / "applied").unlink()
    assert snapshots.save(state(2))
    assert snapshots.load()["m"].state == state(2)


def test_it_names_what_a_start_would_load(snapshots: Snapshots) -> None:
    """Artifacts and golden examples of both versions, of every model."""
    snapshots.save(state(5))
    assert snapshots.artifact_keys() == {artifact(digit).key for digit in "abc"}


WRITER = """
import sys
from pathlib import Path
from modelserve.serving.snapshots import Snapshots
from tests.serving.test_snapshots import URL, state
snapshots = Snapshots(Path(sys.argv[1]), URL)
print("ready", flush=True)
sys.stdin.readline()
for generation in range(int(sys.argv[2]), 100, 3):
    assert snapshots.save(state(generation))
"""


def test_processes_that_write_at_once_leave_the_highest_generation(tmp_path: Path) -> None:
    """Three processes save 99 generations between them; a reader only ever sees whole ones that rise."""
    reader, seen = Snapshots(tmp_path, URL), [0]
    with contextlib.ExitStack() as running:
        writers = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, str(tmp_path), str(first)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=Path(__file__).parents[2],
                )
            )
            for first in (1, 2, 3)
        ]
        for writer in writers:
            running.callback(writer.kill)
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        while any(writer.poll() is None for writer in writers):
            seen += [each.state.generation for each in reader.load().values()]
        assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen == sorted(seen)
    assert reader.load()["m"].state == state(99)
    assert reader._odd == set()
    assert list((tmp_path / "temp").iterdir()) == []
