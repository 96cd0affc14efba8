"""``modelserve predictions …``: the answers that servers keep in the cache that they share."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from modelserve import plugins
from modelserve.cli.printing import told
from modelserve.config import Settings
from modelserve.errors import ConfigError, InvalidInput
from modelserve.ports import Cache
from modelserve.registry.names import is_name

predictions = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look after the predictions that servers keep in a shared cache."
)


@predictions.callback()
def _a_group() -> None:
    """Make it a group: one command alone would be taken for the whole."""


@predictions.command()
@told
def clear(
    context: typer.Context,
    name: str,
    *,
    cache: Annotated[
        str | None, typer.Option(metavar="URL", help="The cache, such as redis://…; or set MODELSERVE_CACHE.")
    ] = None,
) -> None:
    """Forget what was predicted by any version of a model. Servers give their own copies up within ten seconds."""
    settings: Settings = context.obj()
    if not is_name(name):
        raise InvalidInput("name", f"{name!r} is no model's name")
    count = asyncio.run(_clear(_shared(cache or settings.cache), f"{name}:"))
    typer.echo(f"{count} predictions of {name} are forgotten")


def _shared(url: str | None) -> Cache:
    if url is None:
        raise ConfigError("no cache is set; give --cache URL, or set MODELSERVE_CACHE")
    if url.startswith("memory:"):
        raise ConfigError("memory:// is in the processes of the servers, where nobody else can clear it")
    return plugins.cache(url)


async def _clear(cache: Cache, prefix: str) -> int:
    try:
        return await cache.clear(prefix)
    finally:
        await cache.close()
