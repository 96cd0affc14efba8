"""The one way features lie in a store: what a row is called, how a value is written.

A row is a group and a key, ``user_id:42``. It has a value per feature, as JSON text, and ``_ts``, the Unix time in
seconds at which all of them were true. A row is always written whole, so that its one time holds for each value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

from modelserve.errors import InvalidInput
from modelserve.features.declaration import RESERVED
from modelserve.ports import NoValue
from modelserve.signature.examination import TIMES, is_missing, plain
from modelserve.types import Json

TIME: Final = "_ts"
MAX_KEY_BYTES: Final = 512
AHEAD_S: Final = 86_400.0
"""How far ahead of this machine's clock a time may be. What is further is no clock's fault: milliseconds, say."""
_LARGEST: Final = 10**MAX_KEY_BYTES
_EXACT: Final = 2**53  # beyond it, a float stands for several whole numbers
_SCALARS: Final = (bool, int, float, str)
_STRICT: Final = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS


def row_id(group: str, key: str) -> str:
    """Return what a row is called. A group has no colon, so no two rows have one name."""
    return f"{group}:{key}"


def key_of(field: str, value: Any) -> str:
    """Return the key of an entity as text: ``42``, ``42.0`` and ``"42"`` are one entity. Raises ``InvalidInput``."""
    value = plain(value)
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    if type(value) not in (str, int):
        raise InvalidInput(field, f"expected a key, a string or a whole number, got a {type(value).__name__}")
    if type(value) is int and abs(value) >= _LARGEST:
        raise InvalidInput(field, f"a key that is a number has at most {MAX_KEY_BYTES} digits")
    text = str(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidInput(field, "holds a lone surrogate, which is no character") from None
    if not 0 < size <= MAX_KEY_BYTES:
        raise InvalidInput(field, f"a key has 1 to {MAX_KEY_BYTES} bytes, this one has {size}")
    return text


def encoded(values: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the values of a row as they are written. Raises ``InvalidInput`` that names the feature."""
    return {_named(name): _text_of(name, value) for name, value in values.items()}


def decoded(text: bytes | str | None) -> Json | NoValue:
    """Return a value as it was published; what is not there, or no JSON, has its own value."""
    if text is None:
        return NoValue.MISSING
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return NoValue.UNREADABLE


def time_of(text: bytes | str | None) -> float | None:
    """Return the time of a row; None when there is none that can be read."""
    try:
        seconds = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def _named(name: Any) -> str:
    if not isinstance(name, str) or not name or name in RESERVED:
        raise InvalidInput(str(name)[:256], f"cannot be a feature's name; {' and '.join(RESERVED)} belong to the store")
    return name


def _text_of(name: str, value: Any) -> bytes:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in TIMES:
        value = value.tolist()  # Python's numbers hold each of NumPy's exactly
    if is_missing(value):
        return b"null"
    _check(name, value)
    try:
        return orjson.dumps(value, option=_STRICT)
    except TypeError:
        raise InvalidInput(name, "a whole number of more than 64 bits, or text that is no Unicode") from None


def _check(name: str, value: Any) -> None:
    """Refuse what would come back as something else."""
    parts = value if type(value) is list else [value]
    for part in parts:
        if type(part) is list:
            _check(name, part)
        elif type(part) not in _SCALARS or (type(part) is float and math.isinf(part)):
            problem = (
                f"{part!r:.40} cannot be stored; a value is a finite number, a string, a boolean or a list of them"
            )
            raise InvalidInput(name, problem)
