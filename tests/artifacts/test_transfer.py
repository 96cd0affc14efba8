"""Getting a whole object over connections that break, with a clock and pauses of the test's own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.artifacts import transfer
from modelserve.artifacts.transfer import DownloadBudget, whole
from modelserve.errors import ArtifactCorrupt, BackendUnavailable
from modelserve.ports import Interrupted, ObjectChanged, OpenObject

KEY = f"blobs/sha256/{'0' * 64}"
DATA = bytes(range(256)) * 40


class Clock:
    """Time that passes in pauses, and when a test says so."""

    def __init__(self) -> None:
        self.time = 0.0
        self.pauses: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> bool:
        if seconds:
            self.pauses.append(seconds)
        self.time += seconds
        return False

    def effort(self, limit_s: float = 600.0, spread: Callable[[], float] = lambda: 1.0) -> DownloadBudget:
        return DownloadBudget(limit_s, now=self.now, wait=self.wait, spread=spread)


class Source:
    """An object whose attempts give so many bytes each before they break; then the rest."""

    def __init__(self, breaks: list[int], *, data: bytes = DATA, size_known: bool = True, polite: bool = False) -> None:
        self.breaks = iter(breaks)
        self.data = data
        self.starts: list[int] = []
        self.tags: list[str | None] = []
        self._size = len(data) if size_known else None
        self._polite = polite

    @contextlib.contextmanager
    def open(self, start: int, tag: str | None) -> Iterator[OpenObject]:
        self.starts.append(start)
        self.tags.append(tag)
        yield OpenObject("first", self._size, self._pieces(start, next(self.breaks, None)))

    def _pieces(self, start: int, count: int | None) -> Iterator[bytes]:
        end = len(self.data) if count is None else min(len(self.data), start + count)
        for i in range(start, end, 100):
            yield self.data[i : min(i + 100, end)]
        if count is not None and not self._polite:
            raise Interrupted("the line went dead")


@given(breaks=st.lists(st.integers(0, 4000), max_size=4), size_known=st.booleans())
def test_what_arrives_is_whole_and_in_order(breaks: list[int], size_known: bool) -> None:  # noqa: FBT001
    """Wherever it breaks, each byte comes once, and each attempt begins where the one before ended."""
    source = Source(breaks, size_known=size_known)
    assert b"".join(whole(source.open, KEY, Clock().effort())) == DATA
    counts = breaks[: len(source.starts) - 1]
    ends = [min(end, len(DATA)) for end in itertools.accumulate(counts, initial=0)]
    assert source.starts == ends
    assert source.tags == [None] + ["first"] * (len(source.starts) - 1)


def test_an_end_too_soon_is_a_break() -> None:
    """A body that ends in all politeness before the size that was told is not taken for the whole."""
    source = Source([100, 5000], polite=True)
    assert b"".join(whole(source.open, KEY, Clock().effort())) == DATA
    assert source.starts == [0, 100, 5100]


def test_an_empty_object_is_one_attempt() -> None:
    """Nothing is something: a file without bytes arrives."""
    source = Source([], data=b"")
    assert list(whole(source.open, KEY, Clock().effort())) == []
    assert source.starts == [0]


def test_attempts_that_bring_nothing_end_it() -> None:
    """After five in a row the last reason is told; the pauses between them double."""
    clock, source = Clock(), Source([0] * 99)
    with pytest.raises(BackendUnavailable, match=f"the line went dead on {KEY}, 5 times in a row"):
        list(whole(source.open, KEY, clock.effort()))
    assert source.starts == [0] * 5
    assert clock.pauses == [0.25, 0.5, 1.0, 2.0]


def test_attempts_that_get_somewhere_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that breaks again and again, but moves, is followed to the end, with the shortest pauses."""
    monkeypatch.setattr(transfer, "_FRUIT", 1000)
    clock, source = Clock(), Source([1000] * 99)
    assert b"".join(whole(source.open, KEY, clock.effort())) == DATA
    assert len(source.starts) == 11
    assert clock.pauses == [0.25] * 10


def test_the_time_is_for_everything_together() -> None:
    """Attempts and pauses share one limit, and a pause is never longer than what is left."""
    clock = Clock()
    effort = clock.effort(1.0)
    for _ in range(2):
        list(itertools.islice(whole(Source([0]).open, KEY, effort), 1))
    with pytest.raises(BackendUnavailable, match="did not arrive within 1 s"):
        list(whole(Source([0] * 99).open, KEY, effort))
    assert clock.pauses == [0.25, 0.25, 0.25, 0.25]
    assert clock.time == effort.left_s + 1.0


def test_a_trickle_ends_at_the_limit() -> None:
    """Bytes that never stop arriving do not make a download endless."""
    clock, source = Clock(), Source([])
    arriving = whole(source.open, KEY, clock.effort(60.0))
    next(arriving)
    clock.time = 61.0
    with pytest.raises(BackendUnavailable, match="did not arrive within 60 s"):
        next(arriving)


@given(st.floats(0, 1))
def test_half_of_a_pause_is_chance(spread: float) -> None:
    """Processes that failed together come back at different moments, none at once and none later than the longest."""
    clock = Clock()
    effort = clock.effort(1e9, lambda: spread)
    for failures in range(1, 40):
        effort.pause(failures)
    longest = [min(10.0, 0.25 * 2**i) for i in range(39)]
    assert all(most / 2 <= pause <= most for pause, most in zip(clock.pauses, longest, strict=True))


@pytest.mark.parametrize("way", ["refused", "another tag", "another size"])
def test_a_replaced_object_is_not_continued(way: str) -> None:
    """The beginning of one object and the end of another are no object."""
    source, second = Source([5000]), OpenObject("first", len(DATA), iter([b"other"]))

    @contextlib.contextmanager
    def replaced(start: int, tag: str | None) -> Iterator[OpenObject]:
        if not start:
            with source.open(start, tag) as opened:
                yield opened
        elif way == "refused":
            raise ObjectChanged
        else:
            yield second._replace(tag="second") if way == "another tag" else second._replace(size=5)

    found: list[bytes] = []
    with pytest.raises(ArtifactCorrupt, match="took its place while it was read"):
        found.extend(whole(replaced, KEY, Clock().effort()))
    assert b"".join(found) == DATA[:5000]


def test_closing_ends_a_pause_and_a_stream() -> None:
    """Whoever waits for the next attempt, or for the next byte, is let go."""
    closed = DownloadBudget(wait=lambda _: True)
    with pytest.raises(BackendUnavailable, match="closed in the middle of a download"):
        list(whole(Source([]).open, KEY, closed))
    with pytest.raises(BackendUnavailable, match="closed in the middle of a download"):
        list(whole(Source([0]).open, KEY, closed))
