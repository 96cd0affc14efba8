"""What one of all processes does."""

from __future__ import annotations

import sqlalchemy as sa

from modelserve.database.tables.columns import UtcDateTime, metadata

lease = sa.Table(
    "lease",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("holder", sa.Text),  # NULL: released
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("renewed_at", UtcDateTime, nullable=False),
    sa.Column("until", UtcDateTime, nullable=False),
)
