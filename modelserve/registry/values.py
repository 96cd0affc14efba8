"""What the database can keep."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from modelserve.errors import InvalidInput
from modelserve.types import Json


def check_text(field: str, text: str) -> None:
    """Raise ``InvalidInput`` for free text that a database cannot keep."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(field, "holds half of a surrogate pair, which is no character") from error
    if "\0" in text:
        raise InvalidInput(field, "holds a NUL character; remove it")


def plain_json(field: str, value: Json) -> Json:
    """Return ``value`` as JSON gives it back, numpy's numbers as numbers. Raises ``InvalidInput`` naming ``field``."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(field, f"is not JSON: {error}") from error


def _plain(value: object) -> Json:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not a JSON type")
