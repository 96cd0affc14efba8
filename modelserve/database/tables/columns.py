"""What the tables are made of: their metadata, and column types that behave alike on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """A moment: aware going in, UTC coming out, also where the database keeps no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002, D102  # as the base says
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a time zone is not a moment; use an aware datetime")
        return None if value is None else value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002, D102  # as the base says
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class JsonText(sa.types.TypeDecorator[Any]):
    """JSON that comes back as it was written: JSONB on PostgreSQL, text elsewhere.

    SQLite's own kind of column for JSON makes a number of the text ``1.0``: an integer, or one of 64 bits of floating
    point.
    """

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:  # noqa: D102  # as the base says
        return dialect.type_descriptor(postgresql.JSONB() if dialect.name == "postgresql" else sa.Text())

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: D102  # as the base says
        return json.loads(value) if dialect.name != "postgresql" and value is not None else value


BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts up on SQLite
Uuid = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def enum_of(name: str, values: tuple[str, ...]) -> sa.Enum:
    """Return an enumeration that the database checks."""
    return sa.Enum(*values, name=name, create_constraint=True)


def json_column(name: str) -> sa.Column[Any]:
    """Return a column of JSON that is never NULL."""
    return sa.Column(name, Json, nullable=False)
