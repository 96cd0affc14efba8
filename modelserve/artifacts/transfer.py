"""Getting a whole object over connections that break: again, from where it broke off, within a limit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Final, TypeAlias

from modelserve.artifacts import blob
from modelserve.errors import ArtifactCorrupt, BackendUnavailable
from modelserve.ports import Interrupted, ObjectChanged, OpenObject

DOWNLOAD_LIMIT_S: Final = 600.0
_BACKEND: Final = "artifact store"
_FRUITLESS: Final = 5  # attempts in a row: the reconciler comes back anyway, and who waits is told sooner
_FRUIT: Final = 1024 * 1024  # bytes that make an attempt one that got somewhere
_FIRST_PAUSE_S: Final = 0.25
_LAST_PAUSE_S: Final = 10.0

Open: TypeAlias = Callable[[int, str | None], AbstractContextManager[OpenObject]]
"""Makes one attempt from a byte on, as long as the object still has that tag."""


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class DownloadBudget:
    """How long one download may take, with all its attempts and the pauses between them: ``limit_s`` seconds.

    ``now`` tells the time, ``wait`` waits for so many seconds and returns whether all is to end, ``spread`` gives a
    random number between 0 and 1.
    """

    def __init__(
        self,
        limit_s: float = DOWNLOAD_LIMIT_S,
        *,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] = _wait,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._limit_s = limit_s
        self._now = now
        self._wait = wait
        self._spread = spread
        self._end = now() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._end - self._now())

    def check(self, what: str) -> None:
        """Raise ``BackendUnavailable`` when the time is over, or everything is to end."""
        if self.left_s <= 0.0:
            raise BackendUnavailable(_BACKEND, f"{what} did not arrive within {self._limit_s:g} s")
        self._pass(0.0)

    def pause(self, failures: int) -> None:
        """Wait before the next attempt, twice as long after each failure.

        Half of it is left to chance: processes that failed together do not come back together.
        """
        longest = min(_LAST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (failures - 1))
        self._pass(min(self.left_s, longest * (0.5 + 0.5 * self._spread())))

    def _pass(self, seconds: float) -> None:
        if self._wait(seconds):
            raise BackendUnavailable(_BACKEND, "the cache was closed in the middle of a download")


def whole(open_: Open, key: str, effort: DownloadBudget) -> Generator[bytes, None, None]:
    """Give the bytes of one object, once each and in order, however many connections that takes.

    Raises ``BackendUnavailable`` when the time is over, or a few attempts in a row brought nothing, and
    ``ArtifactCorrupt`` when another object took its place meanwhile. What comes is not to be believed before its
    digest was checked.
    """
    got, tag, size, failures = 0, None, None, 0
    while True:
        before = got
        try:
            with open_(got, tag) as opened:
                tag, size = _same(key, opened, tag, size)
                for piece in opened.pieces:
                    got += len(piece)
                    yield piece
                    effort.check(key)
            if size is None or got >= size:
                return
            raise Interrupted(f"it ended at byte {got} of {size}")  # noqa: TRY301  # an end too soon is one more break
        except ObjectChanged as error:
            raise _replaced(key) from error
        except Interrupted as error:
            if got == size:  # all of it was there when the connection broke
                return
            failures = 1 if got - before >= _FRUIT else failures + 1
            if failures >= _FRUITLESS:
                raise BackendUnavailable(_BACKEND, f"{error} on {key}, {failures} times in a row") from error.__cause__
            effort.check(key)
            effort.pause(failures)


def _same(key: str, opened: OpenObject, tag: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Return tag and size; raise when they are not those of the attempt before."""
    if (tag is not None and opened.tag != tag) or (size is not None and opened.size not in {None, size}):
        raise _replaced(key)
    return opened.tag, size if opened.size is None else opened.size


def _replaced(key: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(key, blob.digest_in(key), "another object, which took its place while it was read")
