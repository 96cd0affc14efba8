"""Versions, what is deployed, and every change of it."""

from __future__ import annotations

from typing import get_args

import sqlalchemy as sa

from modelserve.database.tables.columns import BigId, Json, UtcDateTime, enum_of, json_column, metadata
from modelserve.types import Status

model_version = sa.Table(
    "model_version",
    metadata,
    sa.Column("id", BigId, primary_key=True),
    sa.Column("model_name", sa.String(128), nullable=False),
    sa.Column("version", sa.String(128), nullable=False),
    sa.Column("framework", sa.String(64), nullable=False),
    sa.Column("artifact_s3_key", sa.Text, nullable=False),
    sa.Column("artifact_sha256", sa.String(64), nullable=False),
    sa.Column("artifact_bytes", sa.BigInteger, nullable=False),
    sa.Column("artifact_format", sa.String(64), nullable=False),
    json_column("signature"),
    json_column("load_options"),
    sa.Column("example_s3_key", sa.Text),
    sa.Column("example_sha256", sa.String(64)),
    sa.Column("example_bytes", sa.BigInteger),
    sa.Column("conversion", Json),
    sa.Column("attestation", sa.Text),
    json_column("metrics"),
    json_column("tags"),
    sa.Column("status", enum_of("model_status", get_args(Status)), nullable=False),
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
    sa.Column("production_id", BigId),
    sa.Column("previous_id", BigId),
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
    sa.Column("id", BigId, primary_key=True),
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
