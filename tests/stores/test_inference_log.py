"""The table of the inference log, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from modelserve.errors import BackendUnavailable, ConfigError, InvalidInput
from modelserve.ids import uuid7_source
from modelserve.registry import Registry
from modelserve.stores.inference_log import LogTable
from modelserve.types import LogRecord

NOON = dt.datetime(2026, 11, 25, 12, tzinfo=dt.UTC)
new_id = uuid7_source()


def record(second: float = 0.0, **changed: Any) -> LogRecord:
    """Make a record of ``second`` seconds after noon."""
    plain = LogRecord(
        id=new_id(),
        request_id="r",
        row_index=0,
        model_name="m",
        version="1",
        input_hash="ab" * 32,
        inputs='{"x": [1.5, null], "plan": "pro"}',
        prediction="0.1",
        error=None,
        latency_ms=2.5,
        cached=False,
        degraded=None,
        shadow=False,
        occurred_at=NOON + dt.timedelta(seconds=second),
    )
    return plain._replace(**changed)


def ids(table: LogTable, **options: Any) -> list[str]:
    return [each for batch in table.read("m", columns=["id"], **options) for each in batch["id"]]


@pytest.fixture
def table(registry: Registry) -> LogTable:
    """The empty log in a registry's database."""
    return registry.inference_log()


def test_what_is_written_is_read(table: LogTable) -> None:
    """Every column comes back as it was: numbers as arrays, JSON parsed, the moment in UTC."""
    there = dt.timezone(dt.timedelta(hours=5))
    first = record(occurred_at=NOON.astimezone(there), cached=True)
    second = record(
        1.25, row_index=3, shadow=True, prediction=None, inputs=None, input_hash=None, error="Overloaded: x"
    )
    table.append([second, first])

    (batch,) = table.read("m")

    assert batch["id"] == [first.id, second.id]
    assert batch["inputs"] == [{"x": [1.5, None], "plan": "pro"}, None]
    assert batch["prediction"] == [0.1, None]
    assert batch["error"] == [None, "Overloaded: x"]
    assert batch["input_hash"] == ["ab" * 32, None]
    assert batch["row_index"].tolist() == [0, 3]
    assert batch["latency_ms"].dtype == np.float64
    assert batch["cached"].tolist() == [True, False]
    assert batch["shadow"].tolist() == [False, True]
    noon = np.datetime64("2026-11-25T12:00:00", "us")
    assert batch["occurred_at"].tolist() == [noon.item(), (noon + np.timedelta64(1_250_000, "us")).item()]
    assert set(batch) == set(LogRecord._fields)


@pytest.mark.parametrize(
    "text", ["1.0", "0.0", "9223372036854776833", '"abc"', '"1.0"', "null", "true", "[1.0, 2]", '{"a": 0.1}']
)
def test_json_comes_back_as_it_was_written(table: LogTable, text: str) -> None:
    """A prediction keeps its type and all of its digits, on either database; an alone-standing null is a null."""
    table.append([record(prediction=text, inputs=f'{{"x": {text}}}')])
    (batch,) = table.read("m")
    expected = json.loads(text)
    assert batch["prediction"] == [expected]
    assert type(batch["prediction"][0]) is type(expected)
    assert batch["inputs"] == [{"x": expected}]


def test_moments_are_the_same_in_any_time_zone(table: LogTable) -> None:
    """A record is where its moment is, whichever zone it is told in."""
    kolkata = dt.timezone(dt.timedelta(hours=5, minutes=30))
    table.append([record(occurred_at=NOON.astimezone(kolkata))])
    (batch,) = table.read("m", since=NOON, until=NOON + dt.timedelta(microseconds=1))
    assert batch["occurred_at"].tolist() == [NOON.replace(tzinfo=None)]


def test_records_that_are_there_already_change_nothing(table: LogTable) -> None:
    """Adding again, all or in part, leaves one row for each id."""
    written = [record(i) for i in range(5)]
    table.append(written)
    table.append([*written[2:], record(9)])
    table.append([])
    assert len(ids(table)) == 6


def test_a_read_comes_in_batches_of_a_period(table: LogTable) -> None:
    """Batches are of the size asked for, in order, of the model and the period alone; equal moments lose nothing."""
    mine = [record(i // 4) for i in range(40)]
    table.append([*mine, record(3, model_name="other")])

    since, until = NOON + dt.timedelta(seconds=2), NOON + dt.timedelta(seconds=8)
    batches = list(table.read("m", since=since, until=until, columns=["id", "latency_ms"], batch_rows=7))

    assert [len(batch["id"]) for batch in batches] == [7, 7, 7, 3]
    assert sorted(each for batch in batches for each in batch["id"]) == sorted(each.id for each in mine[8:32])
    assert all(set(batch) == {"id", "latency_ms"} for batch in batches)
    assert list(table.read("nobody")) == []


def test_a_read_that_cannot_be_is_refused(table: LogTable) -> None:
    """An unknown column, a batch of no rows and a time without a zone are named."""
    with pytest.raises(InvalidInput, match="columns: the log has no 'colour'"):
        table.read("m", columns=["colour"])
    with pytest.raises(InvalidInput, match="batch_rows"):
        table.read("m", batch_rows=0)
    naive = NOON.replace(tzinfo=None)
    with pytest.raises(InvalidInput, match="since"):
        table.read("m", since=naive)
    with pytest.raises(InvalidInput, match="before"):
        table.prune(naive)
    beyond = dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=1)))
    with pytest.raises(InvalidInput, match=r"since: .* beyond the years"):
        table.read("m", since=beyond)


def test_pruning_takes_what_is_older(table: LogTable) -> None:
    """Old records go, in as many transactions as it takes, of every model or of one; the count says so beforehand."""
    table.append([record(i, model_name=name) for i in range(25) for name in ("m", "other")])
    before = NOON + dt.timedelta(seconds=20)

    assert table.count(before) == 40
    assert table.prune(before, model_name="other", batch_rows=3) == 20
    assert table.count(before) == 20
    assert table.prune(before, batch_rows=7) == 20
    assert len(ids(table)) == 5


def test_a_record_that_the_database_cannot_hold_is_refused_with_its_batch(registry_url: str, table: LogTable) -> None:
    """PostgreSQL holds no zero character: nothing of the batch is added. SQLite holds it."""
    bad = record(prediction='"a\\u0000b"')
    if registry_url.startswith("sqlite"):
        table.append([record(), bad])
        assert len(ids(table)) == 2
        return
    with pytest.raises(InvalidInput):
        table.append([record(), bad])
    assert ids(table) == []


def test_a_log_may_lie_in_a_database_of_its_own(registry: Registry, tmp_path: Path) -> None:
    """By a URL the log is elsewhere, and the registry's own stays empty."""
    with registry.inference_log(f"sqlite:///{tmp_path}/log.db") as apart:
        apart.append([record()])
        assert len(ids(apart)) == 1
    assert ids(registry.inference_log()) == []
    with pytest.raises(ConfigError, match="the inference log keeps its rows in"):
        registry.inference_log("mysql://somewhere")
    with pytest.raises(ConfigError, match="log: expected a database's URL, or False"):
        registry.inference_log(url=True)  # type: ignore[arg-type]


def test_a_log_whose_file_was_moved_away_goes_on_in_a_new_one(registry: Registry, tmp_path: Path) -> None:
    """The attempt that finds no file fails, and is told as the log's; the next one makes it."""
    path = tmp_path / "log.db"
    with registry.inference_log(f"sqlite:///{path}") as apart:
        apart.append([record()])
        for each in tmp_path.glob("log.db*"):
            each.rename(tmp_path / f"old-{each.name}")
        with pytest.raises(BackendUnavailable, match="inference log database is unavailable: its file is gone"):
            apart.append([record()])
        apart.append([record()])
        assert len(ids(apart)) == 1


def test_who_may_write_is_known_beforehand(table: LogTable) -> None:
    """An account with every right may."""
    assert table.may_write()


def test_closing_leaves_the_registrys_connections(tmp_path: Path) -> None:
    """A log that shares a database in memory does not take it along when it is closed."""
    with Registry("sqlite://", artifacts=str(tmp_path)) as registry:
        table = registry.inference_log()
        table.append([record()])
        table.close()
        assert len(ids(table)) == 1


def test_a_file_that_is_read_only_takes_none(tmp_path: Path) -> None:
    """A connection for reading only is told from a database that is away."""
    path = tmp_path / "models.db"
    Registry(f"sqlite:///{path}").upgrade()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    with Registry(f"sqlite:///file:{path}?mode=ro&uri=true", artifacts=str(tmp_path)) as registry:
        assert not registry.inference_log().may_write()


def test_an_account_needs_no_more_than_insert(postgres_url: str, bare: Callable[[str], None]) -> None:
    """INSERT on the table is enough to add; without it the account may not, and that is no error."""
    with Registry(postgres_url, artifacts="memory://x") as registry:
        registry.upgrade()
    bare("DROP ROLE IF EXISTS reader")
    bare("CREATE ROLE reader LOGIN")
    bare("GRANT SELECT ON modelserve_alembic_version, model_version, deployment TO reader")
    try:
        with Registry(postgres_url.replace("postgres@", "reader@"), artifacts="memory://x") as registry:
            table = registry.inference_log()
            assert not table.may_write()
            bare("GRANT INSERT ON inference_log TO reader")
            assert table.may_write()
            table.append([record(), record()])
    finally:
        bare("DROP OWNED BY reader")
        bare("DROP ROLE reader")


@pytest.fixture
def bare(postgres_url: str) -> Callable[[str], None]:
    """Run a statement past the registry, as the superuser."""

    def run(statement: str) -> None:
        engine = sa.create_engine(postgres_url)
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    return run
