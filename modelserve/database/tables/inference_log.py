"""A sample of the answers."""

from __future__ import annotations

import sqlalchemy as sa

from modelserve.database.tables.columns import JsonText, UtcDateTime, Uuid, metadata

inference_log = sa.Table(
    "inference_log",
    metadata,
    sa.Column("id", Uuid, primary_key=True),
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
