"""The compatibility mark, and leases.

Releases at revision 0001 ask for that very revision, so the mark begins here. A migration that only expands leaves it
as it is; one that contracts sets it to its own revision.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_VERSION_TABLE = "modelserve_alembic_version"
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add the mark to Alembic's table, and create the table of leases."""
    op.add_column(_VERSION_TABLE, sa.Column("compatible_with", sa.String(32), nullable=False, server_default="0002"))
    op.create_table(
        "lease",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("holder", sa.Text()),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("renewed_at", _MOMENT, nullable=False),
        sa.Column("until", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_lease"),
    )


def downgrade() -> None:
    """Remove both again."""
    op.drop_table("lease")
    op.drop_column(_VERSION_TABLE, "compatible_with")
