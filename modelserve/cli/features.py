"""``modelserve features …``: what lies in the feature store, and putting it there."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from modelserve.cli.printing import AsJson, moment, show, told
from modelserve.cli.reading import values_of
from modelserve.config import Settings
from modelserve.errors import ConfigError
from modelserve.features import FeatureWriter
from modelserve.ports import FeatureRow, NoValue
from modelserve.tabular import read_table
from modelserve.types import Json

features = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into the feature store, and fill it.")

Store = Annotated[str | None, typer.Option(metavar="URL", help="The feature store; or set MODELSERVE_FEATURES.")]
Group = Annotated[str, typer.Argument(help="The group of rows: the entity's name, such as user_id.")]


def _writer(context: typer.Context, store: str | None) -> FeatureWriter:
    if store is None:
        settings: Settings = context.obj()
        store = settings.features
    if store is None:
        raise ConfigError("there is no feature store; give --store, or set MODELSERVE_FEATURES")
    return FeatureWriter(store)


@features.command("get")
@told
def get_row(
    context: typer.Context,
    group: Group,
    key: str,
    names: Annotated[list[str], typer.Argument(help="The features to read.")],
    *,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Print features of one row, whether each is there, and since when it is true."""
    with _writer(context, store) as writer:
        row = writer.get(group, key, names)
    show(_shown(names, row), as_json=as_json, cells=dict)


def _shown(names: Sequence[str], row: FeatureRow) -> list[dict[str, Json]]:
    written = None if row.written_at is None else _moment(row.written_at)
    return [
        {
            "feature": name,
            "status": value.value if isinstance(value, NoValue) else "null" if value is None else "present",
            "value": None if isinstance(value, NoValue) else value,
            "written": written,
        }
        for name, value in zip(names, row.values, strict=True)  # no frame
    ]


def _moment(seconds: float) -> str:
    try:
        return moment(dt.datetime.fromtimestamp(seconds, dt.UTC))
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.15g} s after 1970"  # milliseconds, say: a publisher's mistake, which is to be seen here


@features.command("put")
@told
def put_row(
    context: typer.Context,
    group: Group,
    key: str,
    values: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Or a JSON object.")],
    *,
    store: Store = None,
) -> None:
    """Write one row in place of the one before it, as of now."""
    with _writer(context, store) as writer:
        writer.put(group, key, values_of(values, "NAME=VALUE"))
    typer.echo(f"{group} {key} is written")


@features.command("load")
@told
def load_file(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A .csv or .parquet table.")],
    *,
    group: Annotated[str, typer.Option(help="The group of rows: the entity's name, such as user_id.")],
    key: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column with the keys, if not GROUP.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column with the time each row was true (else: now).")
    ] = None,
    store: Store = None,
) -> None:
    """Write a row per row of a table; every other column is a feature."""
    with _writer(context, store) as writer:
        table = read_table(file, texts=[key or group])  # 007 is not 7
        count = writer.load(table, group, key=key, time=time)
    typer.echo(f"{count} rows of {group} are written")
