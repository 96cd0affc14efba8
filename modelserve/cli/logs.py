"""``modelserve log …``: how long the inference log is kept."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from modelserve.cli.printing import told
from modelserve.cli.reading import duration_of
from modelserve.config import Settings
from modelserve.registry import Registry

log = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the inference log.")


@log.callback()
def about() -> None:
    """Look after the inference log."""


@log.command()
@told
def prune(
    context: typer.Context,
    *,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="What is older than this, such as 30d or 12h.")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Of this model alone.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say how much would be removed.")] = False,
) -> None:
    """Remove old records, some thousands at a time; print how many they were."""
    settings: Settings = context.obj()
    before = dt.datetime.now(dt.UTC) - duration_of(older_than, "--older-than")
    with (
        Registry(settings.registry, settings.artifacts) as registry,
        registry.inference_log(settings.log or None) as table,
    ):
        count = table.count if dry_run else table.prune
        found = count(before, model_name=model)
    typer.echo(f"{found} records {'would be' if dry_run else 'were'} removed")
