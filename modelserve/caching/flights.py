"""One execution for all who want the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

Out = TypeVar("Out")


class Flight(Generic[Out]):
    """An execution that runs, and those who wait for it.

    It belongs to none of them: one that leaves, or whose deadline passes, leaves the others where they are. When the
    last one has left it is cancelled, since nobody wants it any more.
    """

    __slots__ = ("_wakes", "aboard", "by", "deadline", "future", "keys")

    def __init__(self, future: asyncio.Future[Sequence[Out]], keys: Sequence[str], deadline: float, by: object) -> None:
        self.future = future
        self.keys = keys
        self.deadline = deadline
        self.by = by
        """What runs it."""
        self.aboard = 0
        self._wakes: set[asyncio.Future[None]] = set()

    async def wait(self, deadline: float) -> bool:
        """Wait until it has landed, or ``deadline`` (by the loop's time) is over; return whether it has landed."""
        if self.future.done():
            return True
        loop = asyncio.get_running_loop()
        wake = loop.create_future()
        # The execution's own deadline, if that is the earlier one, is watched by whoever runs it.
        timer = loop.call_at(deadline, _rouse, wake) if deadline < self.deadline else None
        self._wakes.add(wake)
        try:
            await wake
        finally:
            self._wakes.discard(wake)
            if timer is not None:
                timer.cancel()
        return self.future.done()

    def rouse(self) -> None:
        """Wake everybody who waits."""
        for wake in self._wakes:
            _rouse(wake)


class Ticket(NamedTuple, Generic[Out]):
    """A place in a flight; ``own``: whoever has it began the flight."""

    flight: Flight[Out]
    place: int
    own: bool


class Flights(Generic[Out]):
    """The executions that run now, by the keys of what they will answer."""

    def __init__(self) -> None:
        self._tickets: dict[str, Ticket[Out]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def find(self, key: str) -> Ticket[Out] | None:
        """Return the place of a key in the flight that will answer it, if there is one."""
        return self._tickets.get(key)

    def begin(
        self, future: asyncio.Future[Sequence[Out]], keys: Sequence[str], deadline: float, by: object = None
    ) -> Flight[Out]:
        """Let others join an execution that gives one result for each of ``keys``."""
        flight = Flight(future, keys, deadline, by)
        for place, key in enumerate(keys):
            self._tickets[key] = Ticket(flight, place, own=False)
        return flight

    def leave(self, flight: Flight[Out]) -> None:
        """Note that one of those aboard has left."""
        flight.aboard -= 1
        if flight.aboard == 0 and not flight.future.done():
            self.end(flight)
            flight.future.cancel()

    def end(self, flight: Flight[Out]) -> None:
        """Let nobody join any more, and wake those who wait."""
        for key in flight.keys:
            ticket = self._tickets.get(key)
            if ticket is not None and ticket.flight is flight:
                del self._tickets[key]
        flight.rouse()


def _rouse(wake: asyncio.Future[None]) -> None:
    if not wake.done():
        wake.set_result(None)
