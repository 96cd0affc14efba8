"""Publishing rows, and reading them back as a server would."""

from __future__ import annotations

import datetime as dt
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import modelserve as ms
from modelserve.errors import InvalidInput
from modelserve.ports import FeatureRow, NoValue

TIME = dt.datetime(2026, 11, 25, 10, 30, tzinfo=dt.UTC)
NOW = TIME.timestamp() + 1000.5


@pytest.fixture
def writer() -> ms.FeatureWriter:
    """A writer to memory, at a moment of its own."""
    return ms.FeatureWriter("memory://", now=lambda: NOW)


def test_a_row_is_read_as_it_was_written(writer: ms.FeatureWriter) -> None:
    """Values and the moment of writing come back; a whole number and its digits are one key."""
    writer.put("user_id", 42, {"avg": np.float32(0.5), "plan": "pro"})
    assert writer.get("user_id", "42", ["plan", "avg", "other"]) == FeatureRow(("pro", 0.5, NoValue.MISSING), NOW)


@pytest.mark.parametrize(
    "moment",
    [TIME, TIME.replace(tzinfo=None), TIME.timestamp(), np.float64(TIME.timestamp()), TIME.isoformat(),
     np.datetime64("2026-11-25T10:30"), pd.Timestamp(TIME), TIME.astimezone(dt.timezone(dt.timedelta(hours=5)))],
    ids=repr,
)  # fmt: skip
def test_a_time_may_be_written_in_many_ways(writer: ms.FeatureWriter, moment: Any) -> None:
    """Datetimes, NumPy's and pandas' too, ISO text and Unix seconds are one moment; without a zone it is UTC."""
    writer.put("user_id", 1, {"a": 1}, written_at=moment)
    assert writer.get("user_id", 1, ["a"]).written_at == TIME.timestamp()


@pytest.mark.parametrize(
    "moment", ["soon", math.nan, True, [1], 10**400, np.timedelta64(1, "ns"), pd.NaT, np.datetime64("NaT")], ids=repr
)
def test_what_is_no_time_is_refused(writer: ms.FeatureWriter, moment: Any) -> None:
    """A row without a true time is not written."""
    with pytest.raises(InvalidInput, match="time"):
        writer.put("user_id", 1, {"a": 1}, written_at=moment)
    assert writer.get("user_id", 1, ["a"]).written_at is None


@pytest.mark.parametrize("moment", [NOW * 1000, NOW * 1e9, pd.Timestamp(TIME).value, NOW + 90_000])
def test_a_time_that_is_yet_to_come_is_refused(writer: ms.FeatureWriter, moment: Any) -> None:
    """Milliseconds or nanoseconds would be fresh for ever; a clock that is a little ahead is none of that."""
    with pytest.raises(InvalidInput, match=r"time: .* yet to come; give datetimes, or seconds"):
        writer.put("user_id", 1, {"a": 1}, written_at=moment)
    writer.put("user_id", 1, {"a": 1}, written_at=NOW + 3600)


def test_a_table_is_loaded_row_by_row(writer: ms.FeatureWriter) -> None:
    """Each row of a frame is a row of the store; the key and the time are no features."""
    frame = pd.DataFrame({"user_id": range(1200), "avg": np.arange(1200) / 4, "at": [TIME] * 1200})
    frame.loc[5, "avg"] = np.nan
    assert writer.load(frame, "user_id", time="at") == 1200
    assert writer.get("user_id", 1199, ["avg", "at", "user_id"]) == FeatureRow(
        (299.75, NoValue.MISSING, NoValue.MISSING), TIME.timestamp()
    )
    assert writer.get("user_id", 5, ["avg"]).values == (None,)  # noqa: PD011  # no frame


@pytest.mark.parametrize(
    "table", [pd.DataFrame({"user_id": [], "a": []}), {"user_id": [], "a": []}], ids=["frame", "columns"]
)
def test_a_table_without_rows_is_nothing_to_do(writer: ms.FeatureWriter, table: Any) -> None:
    """A job that has nothing to publish today has not failed."""
    assert writer.load(table, "user_id") == 0


def test_a_row_of_a_table_without_a_time_is_refused(writer: ms.FeatureWriter) -> None:
    """A time that is missing does not become now."""
    frame = pd.DataFrame({"user_id": [1, 2], "a": [1, 2], "at": [TIME, None]})
    with pytest.raises(InvalidInput, match="time"):
        writer.load(frame, "user_id", time="at")


def test_columns_are_a_table_too(writer: ms.FeatureWriter) -> None:
    """A mapping of columns, with the keys in another column than the group's name, and vectors as values."""
    assert writer.load({"id": ["a", "b"], "v": np.array([[1.0, 2.0], [3.0, 4.0]])}, "item_id", key="id") == 2
    assert writer.get("item_id", "b", ["v"]) == FeatureRow(([3.0, 4.0],), NOW)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda writer: writer.put("user:id", 1, {"a": 1}), "group"),
        (lambda writer: writer.put("user_id", None, {"a": 1}), "user_id"),
        (lambda writer: writer.put("user_id", 1, {}), "user_id"),
        (lambda writer: writer.put("user_id", 1, {"_ts": 1}), "_ts"),
        (lambda writer: writer.put("user_id", 1, {"a": math.inf}), "a"),
        (lambda writer: writer.put("user_id", 10**600, {"a": 1}), "user_id"),
        (lambda writer: writer.put("user_id", 10**5000, {"a": 1}), "user_id"),
        (lambda writer: writer.put("user_id", np.datetime64("2026-11-25", "ns"), {"a": 1}), "user_id"),
        (lambda writer: writer.put("user_id", 1, {"a": np.datetime64("2026-11-25", "ns")}), "a"),
        (lambda writer: writer.put("user_id", 1, {"a": np.array(["2026-11-25"], "datetime64[ns]")}), "a"),
        (lambda writer: writer.load({"user_id": [1], "a": np.array([5], "timedelta64[ns]")}, "user_id"), "a"),
        (lambda writer: writer.load(pd.DataFrame({"user_id": [1], "a": [pd.Timestamp(TIME)]}), "user_id"), "a"),
        (lambda writer: writer.load({"id": [1], "a": [2]}, "user_id"), "user_id"),
        (lambda writer: writer.load({"user_id": [1], "a": [2]}, "user_id", time="at"), "at"),
    ],
    ids=[
        "group",
        "no key",
        "no feature",
        "reserved",
        "infinite",
        "long key",
        "endless key",
        "date as key",
        "date",
        "dates",
        "duration",
        "pandas' date",
        "no key column",
        "no time column",
    ],
)
def test_what_cannot_be_written_is_refused_by_name(writer: ms.FeatureWriter, call: Any, field: str) -> None:
    """The error names the feature, the entity or the column."""
    with pytest.raises(InvalidInput) as refused:
        call(writer)
    assert refused.value.field == field


async def test_it_works_where_a_loop_runs_already(redis_url: str) -> None:
    """In a notebook, whose thread has an event loop, rows are written and read as anywhere."""
    with ms.FeatureWriter(redis_url) as writer:
        writer.put("user_id", 1, {"a": 1})
        assert writer.get("user_id", 1, ["a"]).values == (1,)  # noqa: PD011  # no frame


def test_training_and_serving_agree(redis_url: str, tmp_path: Path) -> None:
    """What a job writes to a URL is what a server with the same URL predicts with."""
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415  # a second to import

    frame = pd.DataFrame({"age": [1.0, 2.0, 3.0], "spend": [1.0, 5.0, 2.0]})
    model = LinearRegression().fit(frame, [1.0, 2.0, 3.0])
    with ms.FeatureWriter(redis_url) as writer:
        writer.load(frame[["spend"]].assign(user_id=["a", "b", "c"]), "user_id")
        assert writer.get("user_id", "b", ["spend"]).values == (5.0,)  # noqa: PD011  # no frame
    options = {"m": ms.ModelOptions(features=ms.Features("user_id", ["spend"], budget_ms=1000))}
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        registry.register("m", "1", model, example=frame)
        registry.promote("m", "1")
        with ms.ModelServer(registry, options, cache_dir=tmp_path / "cache", features=redis_url) as server:
            answers = server.predict_many("m", [{"age": 1.0, "user_id": "b"}, {"age": 2.0, "user_id": "c"}])
    expected = model.predict(pd.DataFrame({"age": [1.0, 2.0], "spend": [5.0, 2.0]}))
    assert [answer.prediction for answer in answers] == pytest.approx(list(expected))
    assert [answer.degraded for answer in answers] == [(), ()]
