"""What goes in: options of several parts, and files of rows."""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import typer

from modelserve import plugins
from modelserve.errors import ConfigError, InvalidInput, ModelServeError
from modelserve.signature import columns_of
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
        return _read_json(file) if file.suffix == ".json" else _records(read_table(file))
    if sys.stdin.isatty():
        raise typer.BadParameter("give one of the two, or JSON on standard input", param_hint="--inputs, --file")
    return _parse(sys.stdin.buffer.read(), "standard input")


def read_table(path: Path, *, texts: Sequence[str] = ()) -> Any:
    """Read a file of rows into a form that ``Registry.register(example=...)`` takes. Raises ``InvalidInput``.

    ``texts`` are columns that are texts, whatever they look like in a file that does not say so.
    """
    read = _READERS.get(path.suffix)
    if read is None:
        raise InvalidInput(str(path), f"its name must end in one of {', '.join(_READERS)}")
    try:
        return _read_csv(path, texts) if path.suffix == ".csv" else read(path)
    except ModelServeError:
        raise
    except Exception as error:  # whatever a damaged file does to its reader
        raise InvalidInput(str(path), f"cannot be read: {error}") from error


def _records(table: Any) -> list[dict[str, Any]]:
    columns = columns_of(table)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _parse(data: bytes, where: str) -> Json:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(where, f"not JSON: {error}") from error


def _read_json(path: Path) -> Json:
    return _parse(path.read_bytes(), str(path))


def _read_csv(path: Path, texts: Sequence[str] = ()) -> Any:
    """Read a table in which an empty cell is missing, and ``NA`` among numbers; among texts that is one of them."""
    pandas = plugins.require("pandas")
    frame = pandas.read_csv(path, dtype=dict.fromkeys(texts, str))
    gaps = [name for name in frame if frame[name].isna().any() and (name in texts or _holds_texts(frame[name]))]
    if gaps:
        as_written = pandas.read_csv(path, dtype=str, keep_default_na=False)
        for name in gaps:
            frame[name] = as_written[name].astype(object).where(as_written[name] != "", np.nan)  # as pandas has it
    return frame


def _holds_texts(column: Any) -> bool:
    there = column.dropna()
    return len(there) > 0 and all(isinstance(value, str) for value in there)


def _read_array(path: Path) -> Any:
    with path.open("rb") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _read_parquet(path: Path) -> Any:
    pandas = plugins.require("pandas")
    try:
        return pandas.read_parquet(path)
    except ImportError as error:
        raise ConfigError(
            "pandas reads Parquet by pyarrow, which is not installed; run: pip install pyarrow"
        ) from error


_READERS: Final[Mapping[str, Callable[[Path], Any]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".npy": _read_array,
    ".parquet": _read_parquet,
}
