"""Model versions, deployments and their events, the inference log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_JSON_TEXT = sa.Text().with_variant(postgresql.JSONB(), "postgresql")
_UUID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
_MOMENT = sa.DateTime(timezone=True)
_STATUS = sa.Enum("staging", "production", "archived", name="model_status", create_constraint=True)


def upgrade() -> None:
    """Create the four tables."""
    _create_model_version()
    _create_deployment()
    _create_deployment_event()
    _create_inference_log()


def downgrade() -> None:
    """Drop them again, with the type that PostgreSQL made for one of them."""
    for table in ("inference_log", "deployment_event", "deployment", "model_version"):
        op.drop_table(table)
    _STATUS.drop(op.get_bind(), checkfirst=True)


def _create_model_version() -> None:
    op.create_table(
        "model_version",
        sa.Column("id", _BIG_ID, nullable=False),
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("framework", sa.String(64), nullable=False),
        sa.Column("artifact_s3_key", sa.Text(), nullable=False),
        sa.Column("artifact_sha256", sa.String(64), nullable=False),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=False),
        sa.Column("artifact_format", sa.String(64), nullable=False),
        sa.Column("signature", _JSON, nullable=False),
        sa.Column("load_options", _JSON, nullable=False),
        sa.Column("example_s3_key", sa.Text()),
        sa.Column("example_sha256", sa.String(64)),
        sa.Column("example_bytes", sa.BigInteger()),
        sa.Column("conversion", _JSON),
        sa.Column("attestation", sa.Text()),
        sa.Column("metrics", _JSON, nullable=False),
        sa.Column("tags", _JSON, nullable=False),
        sa.Column("status", _STATUS, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model_version"),
        sa.UniqueConstraint("model_name", "version", name="uq_model_version_model_name_version"),
        sa.UniqueConstraint("model_name", "id", name="uq_model_version_model_name_id"),
    )
    op.create_index(
        "uq_model_version_production",
        "model_version",
        ["model_name"],
        unique=True,
        sqlite_where=sa.text("status = 'production'"),
        postgresql_where=sa.text("status = 'production'"),
    )


def _create_deployment() -> None:
    op.create_table(
        "deployment",
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("production_id", _BIG_ID),
        sa.Column("previous_id", _BIG_ID),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("model_name", name="pk_deployment"),
        *(
            sa.ForeignKeyConstraint(
                ["model_name", column], ["model_version.model_name", "model_version.id"], name=f"fk_deployment_{column}"
            )
            for column in ("production_id", "previous_id")
        ),
    )


def _create_deployment_event() -> None:
    op.create_table(
        "deployment_event",
        sa.Column("id", _BIG_ID, nullable=False),
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("production", sa.String(128)),
        sa.Column("previous", sa.String(128)),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("occurred_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deployment_event"),
    )
    op.create_index("uq_deployment_event_generation", "deployment_event", ["model_name", "generation"], unique=True)


def _create_inference_log() -> None:
    op.create_table(
        "inference_log",
        sa.Column("id", _UUID, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("row_index", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.String(128), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("input_hash", sa.String(64)),
        sa.Column("inputs", _JSON_TEXT),
        sa.Column("prediction", _JSON_TEXT),
        sa.Column("error", sa.Text()),
        sa.Column("latency_ms", sa.Double(), nullable=False),
        sa.Column("cached", sa.Boolean(), nullable=False),
        sa.Column("degraded", _JSON_TEXT),
        sa.Column("shadow", sa.Boolean(), nullable=False),
        sa.Column("occurred_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_inference_log"),
    )
    op.create_index("ix_inference_log_model_name_occurred_at", "inference_log", ["model_name", "occurred_at", "id"])
