"""What goes in: options of several parts, and files of rows."""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import orjson
import typer

from modelserve.signature import columns_of
from modelserve.tabular import parse_json, read_table
from modelserve.types import Json

_SIZE: Final = re.compile(r"(\d[\d_]*(?:\.\d+)?) ?((?:[kKMGT]i?)?B?)")
_UNITS: Final = {
    prefix + infix + "B" * with_b: (1024 if infix else 1000) ** power
    for power, prefix in enumerate(["", "K", "M", "G", "T"])
    for infix in (["", "I"] if prefix else [""])
    for with_b in (True, False)
}
_TIME: Final = re.compile(r"(\d{1,9}(?:\.\d+)?) ?([smhd])")
_TIMES: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

# -- options -----------------------------------------------------------------------------------------------


def values_of(texts: Iterable[str], option: str) -> dict[str, Json]:
    """Merge ``key=value`` texts and JSON objects; a value that is not JSON is text.

    Every number is as it is written. NaN and those that are too large are no texts: whoever stores them decides.
    """
    values: dict[str, Json] = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            found = _exactly(text)
            if not isinstance(found, dict):
                raise typer.BadParameter(f"{text!r} is not JSON", param_hint=option)
            values |= found
        else:
            key, value = _pair(text, option)
            values[key] = _exactly(value)
    return values


def _exactly(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tags_of(texts: Iterable[str]) -> dict[str, str]:
    """Read ``key=value`` texts."""
    return dict(_pair(text, "--tag") for text in texts)


def json_option(text: str, option: str) -> Json:
    """Read the value of an option that is JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=option) from error


def bytes_of(text: str, option: str) -> int:
    """Read a number of bytes, with a unit (``20GB``, ``512MiB``) or without."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size such as 20GB, 512MiB or 1000000", param_hint=option)
    return int(float(found[1].replace("_", "")) * _UNITS[found[2].upper()])


_LONGEST: Final = dt.timedelta(days=36_525)


def duration_of(text: str, option: str) -> dt.timedelta:
    """Read a time: ``30d``, ``12h``, ``90m`` or ``45s``."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time such as 30d, 12h, 90m or 45s", param_hint=option)
    number, unit = float(found[1]), _TIMES[found[2]]
    if (duration := dt.timedelta(**{unit: min(number, 1e8)})) > _LONGEST:
        raise typer.BadParameter(f"{text!r} is more than a hundred years", param_hint=option)
    return duration


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
    return key, value


# -- rows --------------------------------------------------------------------------------------------------


def rows_of(inputs: str | None, file: Path | None) -> Any:
    """Return one row as a mapping, or several as a list of them, from an option, a file or standard input."""
    if inputs is not None and file is not None:
        raise typer.BadParameter("give one of the two", param_hint="--inputs, --file")
    if inputs is not None:
        return json_option(inputs, "--inputs")
    if file is not None:
        return parse_json(file.read_bytes(), str(file)) if file.suffix == ".json" else _records(read_table(file))
    if sys.stdin.isatty():
        raise typer.BadParameter("give one of the two, or JSON on standard input", param_hint="--inputs, --file")
    return parse_json(sys.stdin.buffer.read(), "standard input")


def _records(table: Any) -> list[dict[str, Any]]:
    columns = columns_of(table)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
