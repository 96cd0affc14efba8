"""Which schema a database has, whether this release can work with it, and the migrations that bring it here.

Revisions are numbers of four digits, so they compare as texts. Migrations only expand, so a database may be newer than
the process: its compatibility mark names the oldest revision that its code must know. The mark is a column of Alembic's
own table, which every account that serves may read already.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import sqlalchemy as sa

from modelserve.database.tables import HEAD, VERSION_TABLE
from modelserve.errors import SchemaOutdated

_LOCK: Final = 0x6D6F_6465_6C73_7276  # any number that no other program takes: "modelsrv"


class Schema(NamedTuple):
    """The revision of a database, and the oldest one whose code can still work with it."""

    revision: str
    compatible_with: str


def schema_of(connection: sa.Connection) -> Schema | None:
    """Return the schema of a database; None for one without our tables."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    # All columns: a database older than the mark has no such column, and asking for it by name would fail.
    row = connection.execute(sa.text(f"SELECT * FROM {VERSION_TABLE}")).mappings().one_or_none()  # noqa: S608  # a constant
    return None if row is None else Schema(row["version_num"], row.get("compatible_with") or row["version_num"])


def fits(found: Schema | None) -> bool:
    """Whether this release can work with a schema; False for an empty database, and for one that is older.

    Raises ``SchemaOutdated`` for one that is newer and no longer compatible.
    """
    if found is None or found.revision < HEAD:
        return False
    if found.compatible_with > HEAD:
        raise SchemaOutdated(found.revision, HEAD, found.compatible_with)
    return True


def upgrade(connection: sa.Connection) -> None:
    """Create the tables, or bring them to this release, in the caller's transaction; processes take turns.

    A compatible newer schema is left as it is. Raises ``SchemaOutdated`` for one that is not compatible.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    if not fits(schema_of(connection)):
        _migrate(connection)


def _migrate(connection: sa.Connection) -> None:
    from alembic import command  # noqa: PLC0415  # a serving process on a fitting schema needs none of it
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "modelserve.database:migrations")
    try:
        command.upgrade(config, "head")
    except CommandError as error:  # the revision found is none of ours
        found = schema_of(connection)
        raise SchemaOutdated(str(found and found.revision), HEAD) from error
