"""Files of rows: CSV, JSON, NumPy and Parquet, read as registration and the command line take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from modelserve import plugins
from modelserve.errors import ConfigError, InvalidInput, ModelServeError
from modelserve.types import Json


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


def parse_json(data: bytes, where: str) -> Json:
    """Read JSON. Raises ``InvalidInput`` that names ``where`` it came from."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(where, f"not JSON: {error}") from error


def _read_json(path: Path) -> Json:
    return parse_json(path.read_bytes(), str(path))


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
