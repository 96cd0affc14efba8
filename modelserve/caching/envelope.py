"""The form of a cached value: strict JSON that says under which key it was put, and in which form it is.

::

    {"modelserve":1,"key":"churn:5f3c…","value":0.83}

All around the value is read byte for byte as it is written. What deviates there (another key, another form, a missing
end, what somebody else has put there), or holds no JSON, is no value. Nothing is ever unpickled.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson

from modelserve.types import Json

LARGEST: Final = 256 * 1024  # bytes of a value that are worth keeping and sending to and fro
_END: Final = b"}"


class Kept(NamedTuple):
    """A value and its JSON."""

    payload: bytes
    value: Json


def payload_of(value: Json) -> bytes | None:
    """Return a prediction as JSON; None where that would not give the same back, such as for NaN, or is too large."""
    try:
        payload = orjson.dumps(value)
        same = orjson.loads(payload) == value
    except (TypeError, ValueError):
        return None
    return payload if same is True and len(payload) <= LARGEST else None


def sealed(key: str, payload: bytes) -> bytes:
    """Return the value as it is put under ``key``."""
    return _head(key) + payload + _END


def opened(key: str, found: Any) -> Kept | None:
    """Return what was put under ``key`` by :func:`sealed`; None for anything else."""
    head = _head(key)
    if not isinstance(found, bytes) or not found.startswith(head) or not found.endswith(_END):
        return None
    payload = found[len(head) : -len(_END)]
    try:
        return Kept(payload, orjson.loads(payload)) if len(payload) <= LARGEST else None
    except orjson.JSONDecodeError:
        return None


def _head(key: str) -> bytes:
    return b'{"modelserve":1,"key":"%b","value":' % key.encode()
