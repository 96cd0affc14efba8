"""Ids of requests, and the keys that they are routed by: how one is made, and what a caller's own may be."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

_ID: Final = 128
_KEY: Final = 256
REQUEST_ID_RULE: Final = f"give 1 to {_ID} printable characters"
ROUTING_KEY_RULE: Final = f"give 1 to {_KEY} printable characters"


def is_request_id(value: object) -> bool:
    """Whether a value can be a request's id, which is logged and repeated in answers."""
    return isinstance(value, str) and 0 < len(value) <= _ID and value.isprintable()


def is_routing_key(value: object) -> bool:
    """Whether a value can be the key that a canary keeps on one version."""
    return isinstance(value, str) and 0 < len(value) <= _KEY and value.isprintable()


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
