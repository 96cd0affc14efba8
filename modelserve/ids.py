"""Request ids: UUID version 7 (RFC 9562), which sort by time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable


def uuid7_source() -> Callable[[], str]:
    """Return a function that makes UUIDv7s: 48 bits of Unix milliseconds, 72 random bits.

    Each source draws from a generator of its own, seeded by the operating system: the host's ``random.seed(0)``
    cannot make two processes count alike. Make it after a fork, not before.
    """
    bits = random.Random().getrandbits  # noqa: S311  # unique, not secret
    moment, head = 0, ""

    def uuid7() -> str:
        nonlocal moment, head
        now = time.time_ns() // 1_000_000
        if now != moment:  # many ids share a millisecond, and with it their first half
            moment, head = now, f"{now >> 16:08x}-{now & 0xFFFF:04x}-7"
        digits = f"{bits(72):018x}"
        return f"{head}{digits[:3]}-8{digits[3:6]}-{digits[6:]}"

    return uuid7
