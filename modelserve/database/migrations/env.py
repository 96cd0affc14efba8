"""Runs the migrations on the connection that the registry hands over, inside the registry's transaction.

Logging is left as the host configured it.
"""

from __future__ import annotations

from alembic import context

from modelserve.database.tables import VERSION_TABLE, metadata


def run() -> None:
    """Migrate the connection found in the configuration's attributes."""
    connection = context.config.attributes["connection"]
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


run()
