"""Answers to rows of the inference log: hashed, as JSON, and bounded."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import orjson

from modelserve.errors import ModelServeError
from modelserve.events import Served
from modelserve.signature import Signature
from modelserve.signature.digest import input_digest
from modelserve.types import Json, LogRecord, Row

MAX_JSON: Final = 65_536
"""Most bytes of JSON that one row keeps of its inputs, and of its prediction. Larger ones are left out."""
_MAX_MEMORY: Final = 8 * MAX_JSON  # no text of a row that takes more could be short enough
_MAX_ERROR: Final = 500
_MOST_STRINGS: Final = 262_144
"""In all inputs of a request. A request with more is kept without them: only to measure them would hold the loop."""
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_ZERO: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
"""U+0000 as JSON writes it, and not a backslash before the letters u0000."""
_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_SCALAR_BYTES: Final = 32
_STRING_BYTES: Final = 56


class RecordMaker:
    """Makes the records of one version's answers.

    With a ``key`` the hash of an input is HMAC-SHA-256: without the key nobody can find inputs by trying.
    """

    def __init__(self, served: Served, *, keeps_inputs: bool, key: bytes | None, new_id: Callable[[], str]) -> None:
        self._signature = served.signature
        self._keeps_inputs = keeps_inputs
        self._digest = _digest_of(served, key)
        self._new_id = new_id
        self._strings_of_row = 0 if served.signature is None else served.signature.strings
        self._names = () if served.signature is None else tuple(field.name for field in served.signature.inputs)
        self._fixed, self._strings = _room(served.signature)
        # The size is looked at first: the text of a picture takes a hundred times longer to make than to leave out.
        self._inputs_fit = keeps_inputs and served.signature is not None and self._fixed <= _MAX_MEMORY

    def kept(self, served: Served) -> Served:
        """Return an answer as it waits for its record: without inputs that are too many strings."""
        if len(served.inputs) * self._strings_of_row <= _MOST_STRINGS:
            return served
        return served._replace(inputs=((),) * len(served.inputs))

    def fits(self, served: Served) -> bool:
        """Whether this is still the version: another database may have another one of the same name."""
        return served.signature is self._signature

    def size_of(self, served: Served, error: str | None) -> int:
        """Return about how many bytes an answer holds in memory."""
        size = _size_of_text(served.request_id) + len(served.inputs) * self._fixed + _size_of_value(served.values)
        for i in self._strings:
            size += sum(_size_of_text(row[i]) for row in served.inputs if row)
        return size if error is None else size + _size_of_text(error)

    def told(self, error: BaseException) -> str:
        """Tell an error's kind; its words too, unless they could quote inputs that are not to be kept."""
        kind = type(error).__name__
        if not self._keeps_inputs or not isinstance(error, ModelServeError):
            return kind
        told = f"{kind}: {error}"[:_MAX_ERROR].replace("\0", _REPLACEMENT)
        return told.encode(errors="replace").decode()

    def __call__(self, served: Served, error: str | None, occurred_at: dt.datetime) -> list[LogRecord]:
        """Return a record for each row; one, without inputs, for a request that did not fit the signature.

        Rows that were answered before their features were read are without inputs as well.
        """
        count = rows_of(served)
        rows: Iterable[Row] = served.inputs or ((),) * count
        values: Iterable[Json] = served.values or (None,) * count
        cached: Iterable[bool] = served.cached or (False,) * count
        degraded: Iterable[tuple[str, ...]] = served.degraded or ((),) * count
        return [
            LogRecord(  # by position: naming fourteen arguments takes as long as the JSON
                self._new_id(),
                served.request_id,
                index,
                served.model_name,
                served.version,
                self._digest(row).hex() if row and self._digest is not None else None,
                self._inputs(row) if row else None,
                None if error else _prediction(value),
                error,
                served.latency_ms,
                known,
                json_text(by_default) if by_default else None,
                served.shadow,
                occurred_at,
            )
            for index, (row, value, known, by_default) in enumerate(zip(rows, values, cached, degraded, strict=True))
        ]

    def _inputs(self, row: Row) -> str | None:
        if not self._inputs_fit:
            return None
        if self._strings and self._fixed + sum(_size_of_text(row[i]) for i in self._strings) > _MAX_MEMORY:
            return None
        return json_text(dict(zip(self._names, row, strict=True)))  # ten times faster than by Signature.record


def rows_of(served: Served) -> int:
    """Return how many records there are of an answer."""
    return len(served.inputs) or len(served.values) or 1


def _prediction(value: Json) -> str | None:
    return json_text(value) if _size_of_value(value) <= _MAX_MEMORY else None


def json_text(value: Json) -> str | None:
    """Return a value as JSON, with NaN and infinity as null; None for what has no such form or is too large.

    Of the character U+0000, which PostgreSQL has no place for, there is the replacement character.
    """
    try:
        data = orjson.dumps(value, option=_OPTIONS, default=_as_list)
    except TypeError:
        return None
    if len(data) > MAX_JSON:
        return None
    text = data.decode()
    return _ZERO.sub(rf"\1{_REPLACEMENT}", text) if "\\u0000" in text else text


def _as_list(value: Any) -> list[Any]:
    """Make a list of an array that has no fast way to JSON, such as one of texts."""
    if isinstance(value, np.ndarray):
        return value.tolist()  # type: ignore[no-any-return]
    raise TypeError


def _digest_of(served: Served, key: bytes | None) -> Callable[[Row], bytes] | None:
    if served.meta is None or served.signature is None:
        return None
    return input_digest(served.meta, served.signature.canonical, key=key)


def _room(signature: Signature | None) -> tuple[int, tuple[int, ...]]:
    """Return what a row takes besides its texts, in bytes, and which inputs are texts."""
    fixed, texts = _SCALAR_BYTES, []
    for i, field in enumerate(() if signature is None else signature.inputs):
        if field.dtype == "string":
            texts.append(i)
        elif field.shape:
            fixed += int(np.prod(field.shape)) * field.numpy_dtype.itemsize
        fixed += _SCALAR_BYTES
    return fixed, tuple(texts)


def _size_of_text(value: Any) -> int:
    if isinstance(value, str):
        return _STRING_BYTES + len(value)
    if isinstance(value, np.ndarray):
        return sum(_size_of_text(each) for each in value.ravel().tolist())
    return _SCALAR_BYTES


def _size_of_value(value: Json) -> int:
    if isinstance(value, str):
        return _STRING_BYTES + len(value)
    if isinstance(value, dict):
        return _SCALAR_BYTES + sum(map(_size_of_value, value.values()))
    if not isinstance(value, list | tuple) or not value:
        return _SCALAR_BYTES
    if isinstance(value[0], str | dict | list | tuple):
        return _SCALAR_BYTES + sum(map(_size_of_value, value))
    return _SCALAR_BYTES * (1 + len(value))  # numbers
