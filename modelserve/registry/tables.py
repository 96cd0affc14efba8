"""The tables of the registry, for SQLite and PostgreSQL. The migrations create them; a test compares the two."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any, Final, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from modelserve.types import Status

VERSION_TABLE: Final = "modelserve_alembic_version"  # the host may keep an alembic_version of its own
HEAD: Final = "0001"

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


_BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts up on SQLite
_Uuid = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
_Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def _enum(name: str, values: tuple[str, ...]) -> sa.Enum:
    return sa.Enum(*values, name=name, create_constraint=True)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, _Json, nullable=False)


model_version = sa.Table(
    "model_version",
    metadata,
    sa.Column("id", _BigId, primary_key=True),
    sa.Column("model_name", sa.String(128), nullable=False),
    sa.Column("version", sa.String(128), nullable=False),
    sa.Column("framework", sa.String(64), nullable=False),
    sa.Column("artifact_s3_key", sa.Text, nullable=False),
    sa.Column("artifact_sha256", sa.String(64), nullable=False),
    sa.Column("artifact_bytes", sa.BigInteger, nullable=False),
    sa.Column("artifact_format", sa.String(64), nullable=False),
    _json("signature"),
    _json("load_options"),
    sa.Column("example_s3_key", sa.Text),
    sa.Column("example_sha256", sa.String(64)),
    sa.Column("example_bytes", sa.BigInteger),
    sa.Column("conversion", _Json),
    sa.Column("attestation", sa.Text),
    _json("metrics"),
    _json("tags"),
    sa.Column("status", _enum("model_status", get_args(Status)), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("model_name", "version"),
    sa.UniqueConstraint("model_name", "id"),
)
_in_production = model_version.c.status == sa.literal_column("'production'")
sa.Index(
    "uq_model_version_production",
    model_version.c.model_name,
    unique=True,
    sqlite_where=_in_production,
    postgresql_where=_in_production,
)

deployment = sa.Table(
    "deployment",
    metadata,
    sa.Column("model_name", sa.String(128), primary_key=True),
    sa.Column("production_id", _BigId),
    sa.Column("previous_id", _BigId),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    *(
        sa.ForeignKeyConstraint(  # a version of this very model
            ["model_name", column], ["model_version.model_name", "model_version.id"], name=f"fk_deployment_{column}"
        )
        for column in ("production_id", "previous_id")
    ),
)

deployment_event = sa.Table(
    "deployment_event",
    metadata,
    sa.Column("id", _BigId, primary_key=True),
    sa.Column("model_name", sa.String(128), nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("version", sa.String(128), nullable=False),
    sa.Column("production", sa.String(128)),
    sa.Column("previous", sa.String(128)),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Index("uq_deployment_event_generation", "model_name", "generation", unique=True),
)

inference_log = sa.Table(
    "inference_log",
    metadata,
    sa.Column("id", _Uuid, primary_key=True),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("row_index", sa.Integer, nullable=False),
    sa.Column("model_name", sa.String(128), nullable=False),
    sa.Column("version", sa.String(128), nullable=False),
    sa.Column("input_hash", sa.String(64)),
    sa.Column("inputs", JsonText),
    sa.Column("prediction", JsonText),
    sa.Column("error", sa.Text),
    sa.Column("latency_ms", sa.Double, nullable=False),
    sa.Column("cached", sa.Boolean, nullable=False),
    sa.Column("degraded", JsonText),
    sa.Column("shadow", sa.Boolean, nullable=False),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Index("ix_inference_log_model_name_occurred_at", "model_name", "occurred_at", "id"),
)
