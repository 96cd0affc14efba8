"""Migrations of the tests beside the real ones, and what a migration took away from the code before it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from modelserve.database import migrations
from modelserve.database.tables import VERSION_TABLE

REAL: Final = Path(migrations.__file__).parent
_TEMPLATE: Final = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = {revision!r}, {down!r}


def upgrade():
{body}
"""


def future(folder: Path, steps: Mapping[str, str], after: str) -> Path:
    """Write migrations of later releases into a folder, by revision, the first of them after ``after``."""
    for revision, body in steps.items():
        text = _TEMPLATE.format(revision=revision, down=after, body=textwrap.indent(textwrap.dedent(body), "    "))
        (folder / f"{revision}_future.py").write_text(text)
        after = revision
    return folder


def migrate(engine: sa.Engine, revision: str, *folders: Path) -> None:
    """Do what ``modelserve db upgrade`` of the release at ``revision`` does."""
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(REAL))
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", "\n".join(map(str, (REAL / "versions", *folders))))
        command.upgrade(config, revision)


def compatible_with(engine: sa.Engine) -> str | None:
    """Return the compatibility mark; None without one."""
    with engine.connect() as connection:
        row = connection.execute(sa.text(f"SELECT * FROM {VERSION_TABLE}")).mappings().one()  # noqa: S608  # a constant
        return row.get("compatible_with")


def shape(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    """Describe every table as code that uses it depends on it."""
    found = sa.inspect(engine)
    return {
        table: {
            "columns": {each["name"]: each for each in found.get_columns(table)},
            "checks": {str(each["sqltext"]) for each in found.get_check_constraints(table)},
            "unique": {
                *(tuple(each["column_names"]) for each in found.get_unique_constraints(table)),
                *(tuple(each["column_names"]) for each in found.get_indexes(table) if each["unique"]),
            },
            "references": {tuple(each["constrained_columns"]) for each in found.get_foreign_keys(table)},
        }
        for table in found.get_table_names()
    }


def contractions(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what the code of the release before can no longer do after a migration."""
    found = [f"{table}: dropped or renamed" for table in before.keys() - after.keys()]
    for table in before.keys() & after.keys():
        old, new = before[table], after[table]
        found += [f"{table}.{name}: {why}" for name, why in _of_columns(old["columns"], new["columns"])]
        found += [f"{table}: {rule} changed" for rule in ("checks", "unique", "references") if old[rule] != new[rule]]
    return sorted(found)


def _of_columns(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, "dropped or renamed") for name in old.keys() - new.keys()]
    for name in old.keys() & new.keys():
        if repr(old[name]["type"]) != repr(new[name]["type"]):
            found.append((name, "another type"))
        if old[name]["nullable"] and not new[name]["nullable"]:
            found.append((name, "NOT NULL since"))
        if old[name]["default"] is not None and new[name]["default"] is None:
            found.append((name, "its default dropped"))
    added = [each for name, each in new.items() if name not in old]
    refusing = [each["name"] for each in added if not each["nullable"] and each["default"] is None]
    return found + [(name, "NOT NULL without a server default") for name in refusing]
