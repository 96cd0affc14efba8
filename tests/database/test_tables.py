"""The tables: migrations and metadata agree, and the database itself holds the invariants."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from modelserve.database import migrations
from modelserve.database.tables import (
    HEAD,
    VERSION_TABLE,
    deployment,
    deployment_event,
    metadata,
    model_version,
)
from modelserve.database.tables.columns import UtcDateTime
from modelserve.registry import Registry
from modelserve.types import ModelVersion

Insert: TypeAlias = Callable[..., ModelVersion]


def test_head_is_the_last_migration() -> None:
    """The constant that the cheap check compares with is the last of the migration scripts."""
    assert ScriptDirectory(Path(migrations.__file__).parent).get_current_head() == HEAD


def test_migrations_make_the_tables_of_the_metadata(registry: Registry, bare_engine: sa.Engine) -> None:
    """Autogenerate finds nothing to add to a migrated database."""
    registry.upgrade()
    with bare_engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_the_database_refuses_a_second_production_row(
    registry: Registry, bare_engine: sa.Engine, insert: Insert
) -> None:
    """Even SQL past the registry cannot put two versions of a model into production."""
    insert(registry, "churn", "1")
    insert(registry, "churn", "2")
    insert(registry, "fraud", "1")
    registry.promote("churn", "1")
    registry.promote("fraud", "1")
    second = sa.update(model_version).where(model_version.c.model_name == "churn").values(status="production")
    with pytest.raises(sa.exc.IntegrityError), bare_engine.begin() as connection:
        connection.execute(second)


def test_the_database_refuses_an_unknown_status(registry: Registry, bare_engine: sa.Engine, insert: Insert) -> None:
    """The status is an enum type on PostgreSQL and checked on SQLite."""
    insert(registry, "churn", "1")
    with pytest.raises(sa.exc.DBAPIError), bare_engine.begin() as connection:
        connection.execute(sa.text("UPDATE model_version SET status = 'retired'"))


def test_the_database_refuses_to_serve_a_version_of_another_model(
    registry: Registry, bare_engine: sa.Engine, insert: Insert
) -> None:
    """What is in production under a name is a version of that name, whoever writes the row."""
    insert(registry, "churn", "1")
    other = insert(registry, "fraud", "1")
    for column in ("production_id", "previous_id"):
        with pytest.raises(sa.exc.IntegrityError), bare_engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                connection.execute(sa.text("PRAGMA foreign_keys = ON"))
            wrong = sa.update(deployment).where(deployment.c.model_name == "churn").values({column: other.id})
            connection.execute(wrong)


def test_a_version_that_was_not_converted_has_no_report(
    registry: Registry, bare_engine: sa.Engine, insert: Insert
) -> None:
    """What a conversion was found to differ in is kept as it was; without one the column is NULL, not a JSON null."""
    assert insert(registry, "churn", "1").conversion is None
    assert insert(registry, "churn", "2", conversion={"rows": 3}).conversion == {"rows": 3}
    with bare_engine.begin() as connection:
        unconverted = connection.execute(sa.text("SELECT version FROM model_version WHERE conversion IS NULL"))
        assert unconverted.scalars().all() == ["1"]


def test_the_database_refuses_a_generation_told_twice(
    registry: Registry, bare_engine: sa.Engine, insert: Insert
) -> None:
    """A generation of a model has one event."""
    insert(registry, "churn", "1")
    copied = [column for column in deployment_event.c if column.name != "id"]
    copy = sa.insert(deployment_event).from_select([column.name for column in copied], sa.select(*copied))
    with pytest.raises(sa.exc.IntegrityError), bare_engine.begin() as connection:
        connection.execute(copy)


@pytest.mark.postgres
def test_postgresql_has_jsonb_and_real_enums(postgres_url: str) -> None:
    """JSON is kept as JSONB, words as ENUM, moments with their time zone."""
    with Registry(postgres_url) as registry:
        registry.upgrade()
        with registry._database.read() as connection:
            columns = {each["name"]: each["type"] for each in sa.inspect(connection).get_columns("model_version")}
    assert type(columns["signature"]).__name__ == "JSONB"
    assert isinstance(columns["status"], sa.Enum)
    assert isinstance(columns["created_at"], sa.DateTime)
    assert columns["created_at"].timezone


def test_a_moment_needs_a_time_zone() -> None:
    """A naive time is refused instead of guessed at."""
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(sa.exc.StatementError, match="time zone"):
        connection.execute(sa.select(sa.bindparam("at", dt.datetime(2026, 1, 1), UtcDateTime)))  # noqa: DTZ001  # the point
    engine.dispose()
