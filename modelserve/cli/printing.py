"""What comes out: JSON, tables, one line per error. Nothing is wrapped or coloured where no human looks on."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import orjson
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from modelserve.errors import InferenceFailed, ModelServeError
from modelserve.types import Json

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Make an error of the library one red line on standard error and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except ModelServeError as error:
            Console(stderr=True).print(Text(printable(f"error: {error}"), style="red"), soft_wrap=True)
            raise typer.Exit(1) from error

    return run


def show(found: Sequence[Any], *, as_json: bool, cells: Callable[[Any], dict[str, Any]]) -> None:
    """Print values as JSON, or as a line each with what ``cells`` makes of it: heading → cell."""
    if as_json:
        typer.echo(encode(found))
    elif found:
        rows = [cells(each) for each in found]
        _print_table([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)])


def _print_table(lines: list[list[str]]) -> None:
    """Align the columns. A line may be longer than the terminal is wide: it can be searched and cut all the same."""
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    console = Console()
    for i, line in enumerate(lines):
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        console.print(Text("  ".join(padded).rstrip(), style="" if i else "bold"), soft_wrap=True)


def _cell(value: Any) -> str:
    return "-" if value is None or value == "" else printable(str(value))


def moment(time: dt.datetime) -> str:
    """Write a time in UTC, to the second."""
    return time.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def pairs(values: Mapping[str, Json]) -> str:
    """Write a mapping as ``key=value key=value``."""
    return " ".join(f"{key}={value if isinstance(value, str) else encode(value)}" for key, value in values.items())


def encode(document: Any) -> str:
    """Write JSON on one line. Raises ``InferenceFailed`` for what has no JSON form, which only a model can answer."""
    try:
        return orjson.dumps(document).decode()
    except TypeError as error:
        raise InferenceFailed(f"the model's answer has no JSON form: {error}") from error


def printable(text: str) -> str:
    """Spell out what could break a line or command a terminal: names and reasons come from other people."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
