"""One caller's items on their way through batches, and what is done with the batches that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from modelserve.errors import DeadlineExceeded, InferenceFailed, NotReady

In = TypeVar("In")
Out = TypeVar("Out")


class Call(Generic[In, Out]):
    """One caller's items and the future it waits on."""

    __slots__ = ("deadline", "entered", "future", "items", "missing", "results", "tainted", "taken")

    def __init__(
        self, items: Sequence[In], deadline: float, entered: float, future: asyncio.Future[Sequence[Out | Exception]]
    ) -> None:
        self.items = items
        self.deadline = deadline
        self.entered = entered
        self.future = future
        self.taken = 0
        self.tainted = False
        """Whether one of its items is bad."""
        self.missing = len(items)
        self.results: list[Out | Exception | None] | None = None

    def settle(self, start: int, results: Sequence[Out | Exception]) -> None:
        """Take the results of the items from ``start`` on; answer the caller once none is missing."""
        self.missing -= len(results)
        if len(results) < len(self.items):  # a part of a split call; the ordinary one is answered whole, by one batch
            self.results = self.results or [None] * len(self.items)
            self.results[start : start + len(results)] = results
            results = self.results  # type: ignore[assignment]  # while none is missing, none is None
        # The caller may have gone or been told of its deadline: a resolver only ever says "if not done, set".
        if self.missing == 0 and not self.future.done():
            self.future.set_result(results)

    def expire(self) -> None:
        """Tell the caller that its time is over."""
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded(max(0.0, self.deadline - self.entered)))

    def refuse(self) -> None:
        """Tell the caller that nobody will run this."""
        if not self.future.done():
            self.future.set_exception(shutting_down())

    def wanted(self, now: float) -> bool:
        """Whether anybody still waits for this call; tells its caller when its time is over."""
        if self.deadline <= now:
            self.expire()
        return not self.future.done()


Part: TypeAlias = tuple[Call[In, Out], int, int]
"""Items ``start`` to ``stop`` of a call."""
Parts: TypeAlias = list[Part[In, Out]]


def rows_of(parts: Iterable[Part[In, Out]]) -> int:
    """Return how many items these are."""
    return sum(stop - start for _, start, stop in parts)


def calls_of(parts: Iterable[Part[In, Out]]) -> Iterator[Call[In, Out]]:
    """Return the call of each part."""
    return (call for call, _, _ in parts)


def items_of(parts: Sequence[Part[In, Out]]) -> list[In]:
    """Return the items of a batch."""
    return [item for call, start, stop in parts for item in call.items[start:stop]]


def halve(parts: Sequence[Part[In, Out]], rows: int) -> tuple[Parts[In, Out], Parts[In, Out]]:
    """Split a batch after ``rows`` items, through the middle of a call if need be."""
    left: Parts[In, Out] = []
    right: Parts[In, Out] = []
    for call, start, stop in parts:
        middle = min(stop, start + max(0, rows))
        rows -= stop - start
        if middle > start:
            left.append((call, start, middle))
        if stop > middle:
            right.append((call, middle, stop))
    return left, right


def scatter(parts: Sequence[Part[In, Out]], results: Sequence[Out | Exception]) -> None:
    """Hand each call its share of a batch's results."""
    position = 0
    for call, start, stop in parts:
        call.settle(start, results[position : position + stop - start])
        position += stop - start


def fail(parts: Sequence[Part[In, Out]], error: Exception) -> None:
    """Give every item of a batch this error."""
    scatter(parts, [copy_of(error) for _, start, stop in parts for _ in range(start, stop)])


def error_of(running: asyncio.Future[Sequence[Out]], rows: int) -> Exception | None:
    """Return what went wrong with a batch that ended, if anything did."""
    if running.cancelled():
        return shutting_down()
    error = running.exception()
    if error is None:
        return _mismatch(running.result(), rows)
    return error if isinstance(error, Exception) else InferenceFailed(f"the model raised {type(error).__name__}")


def shutting_down() -> NotReady:
    """Make the error of a call that came too late."""
    return NotReady("the model is being taken out of service")


def _mismatch(results: object, rows: int) -> InferenceFailed | None:
    if not isinstance(results, Sequence):
        return InferenceFailed(f"the model answered a {type(results).__name__} for {rows} rows")
    return None if len(results) == rows else InferenceFailed(f"the model answered {len(results)} rows for {rows}")


def copy_of(error: BaseException) -> Exception:
    """Give each caller an exception of its own: one raised in many tasks would collect all their tracebacks."""
    try:
        own: Any = error.__class__.__new__(error.__class__)
        own.args = error.args
        own.__dict__.update(error.__dict__)
    except Exception:  # noqa: BLE001  # a class with a constructor of its own kind; no caller may be left waiting for it
        own = InferenceFailed(str(error))
    own.__cause__ = error.__cause__
    return own  # type: ignore[no-any-return]
