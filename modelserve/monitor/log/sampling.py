"""Which requests are looked at: decided by the request's id, so that all who look at one decide alike."""

from __future__ import annotations

import zlib
from typing import Final

_SPAN: Final = 2**32
"""How many values :func:`sample_point` has."""


def sample_point(request_id: str) -> int:
    """Return where a request lies in ``range(2**32)``: CRC-32 of its id in UTF-8.

    The same in every process and language, so the row of a shadow and that of production are kept or left together.
    Callers who choose their own ids choose their place.
    """
    return zlib.crc32(request_id.encode(errors="replace"))


def threshold(rate: float) -> int:
    """Return the number that :func:`sample_point` is below for the given share (0 to 1) of all ids.

    >>> sample_point("any") < threshold(1.0), sample_point("any") < threshold(0.0)
    (True, False)
    """
    return round(rate * _SPAN)
