"""Request ids: UUID version 7 (RFC 9562), which sort by time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

_VERSION_AND_VARIANT: Final = 0x7000_8000_0000_0000_0000


def uuid7_source() -> Callable[[], str]:
    """Return a function that makes UUIDv7s: 48 bits of Unix milliseconds, 74 random bits.

    Each source draws from a generator of its own, seeded by the operating system: the host's ``random.seed(0)``
    cannot make two processes count alike. Make it after a fork, not before.
    """
    bits = random.Random().getrandbits  # noqa: S311  # unique, not secret

    def uuid7() -> str:
        milliseconds = time.time_ns() // 1_000_000
        digits = f"{(milliseconds << 80) | _VERSION_AND_VARIANT | (bits(12) << 64) | bits(62):032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    return uuid7
