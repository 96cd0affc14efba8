"""Long work on an event loop, a step at a time: between two steps everything else has its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Work that yields after each step, and returns its result. A step takes a few milliseconds."""


async def in_turns(steps: Steps[T]) -> T:
    """Return the result of the work, or raise what it raises; the loop is free after each step."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        await asyncio.sleep(0)
