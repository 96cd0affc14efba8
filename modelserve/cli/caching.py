"""``modelserve cache …``: what lies in the disk cache of this machine, and what of it may go."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from modelserve.artifacts import CacheEntry, DiskCache, default_cache_folder
from modelserve.cli.printing import AsJson, moment, show, told
from modelserve.cli.reading import bytes_of, duration_of
from modelserve.config import Settings
from modelserve.errors import ModelServeError
from modelserve.registry import Registry
from modelserve.serving.snapshots import artifact_keys_in
from modelserve.types import Json

cache = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after this machine's cache of artifacts.")
_SQLITE_FILE = "sqlite:///"


def _cache(context: typer.Context) -> DiskCache:
    settings: Settings = context.obj()
    folder = settings.cache_dir or default_cache_folder()
    return DiskCache(folder, spared=partial(artifact_keys_in, folder))


@cache.command("ls")
@told
def list_entries(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List what is in the cache, whether it is in use, and the versions that refer to it."""
    entries = _cache(context).entries()
    versions = _versions_of(entries, _registered(context.obj()))
    show(
        [_told_of(each) | {"versions": versions and versions.get(each.key, [])} for each in entries],
        as_json=as_json,
        cells=lambda each: _cells(each) | {"versions": "?" if versions is None else ", ".join(each["versions"])},
    )


@cache.command()
@told
def prune(
    context: typer.Context,
    *,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Stop when the rest takes no more, such as 20GB.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only what was not used for so long, such as 30d or 12h.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what a server would start from while the registry is down.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is not in use, used longest ago first; print what was removed.

    What a server would start from while the registry is down stays, unless it is told --all.
    """
    age = None if older_than is None else duration_of(older_than, "--older-than")
    removed = _cache(context).prune(
        max_bytes=None if max_bytes is None else bytes_of(max_bytes, "--max-bytes"),
        used_before=None if age is None else dt.datetime.now(dt.UTC) - age,
        spare=not everything,
        dry_run=dry_run,
    )
    show([_told_of(each) for each in removed], as_json=as_json, cells=_cells)


@cache.command()
@told
def verify(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Hash everything again and set aside what is damaged; exit with 1 if anything was."""
    examined = _cache(context).verify()
    show(
        examined,
        as_json=as_json,
        cells=lambda each: {"key": each.key, "bytes": each.size, "state": "sound" if each.sound else "DAMAGED"},
    )
    if not all(each.sound for each in examined):
        raise typer.Exit(1)


def _told_of(entry: CacheEntry) -> dict[str, Json]:
    return {
        "key": entry.key,
        "kind": entry.kind,
        "size": entry.size,
        "last_use": entry.last_use,
        "in_use": entry.in_use,
    }


def _cells(told_of: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": told_of["key"],
        "kind": told_of["kind"],
        "bytes": told_of["size"],
        "last use": moment(told_of["last_use"]),
        "in use": "yes" if told_of["in_use"] else "no",
    }


def _registered(settings: Settings) -> dict[str, list[str]] | None:
    """Return the versions that refer to each key; None where the registry cannot be read. Looking makes no database."""
    file = settings.registry.removeprefix(_SQLITE_FILE).partition("?")[0]
    if file != settings.registry and not Path(file).exists():
        return None
    found = defaultdict(list)
    try:
        with Registry(settings.registry, settings.artifacts) as registry:
            for version in (each for name in registry.models() for each in registry.versions(name)):
                for artifact in filter(None, (version.artifact, version.example)):
                    found[artifact.key].append(f"{version.model_name} {version.version}")
    except ModelServeError:
        return None
    return found


def _versions_of(entries: list[CacheEntry], registered: Mapping[str, list[str]] | None) -> dict[str, list[str]] | None:
    """Count the versions of a folder as those of its parts too."""
    if registered is None:
        return None
    found = {entry.key: set(registered.get(entry.key, ())) for entry in entries}
    for entry in entries:
        for part in entry.parts:
            found.setdefault(part, set()).update(registered.get(entry.key, ()))
    return {key: sorted(versions) for key, versions in found.items()}
