"""Names of examples that are the same in every process: workers that share a run have to collect the same tests."""

from __future__ import annotations

import re


def stable(value: object) -> str:
    """Return an example's repr without the address of an object."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
