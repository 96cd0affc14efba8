"""What may go from a cache, and in which order."""

from __future__ import annotations

import datetime as dt

from hypothesis import given
from hypothesis import strategies as st

from modelserve.artifacts.pruning import CacheEntry, removable

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def at(hour: int) -> dt.datetime:
    return START + dt.timedelta(hours=hour)


def entry(key: str, size: int = 10, hour: int = 0, parts: tuple[str, ...] = (), *, in_use: bool = False) -> CacheEntry:
    kind = "folder" if parts else "file"
    return CacheEntry(key=key, kind=kind, size=size, last_use=at(hour), in_use=in_use, parts=parts)  # type: ignore[arg-type]


def keys(found: list[CacheEntry]) -> list[str]:
    return [each.key for each in found]


def test_what_was_used_longest_ago_goes_first_and_no_more_than_needed() -> None:
    """It ends as soon as the rest fits."""
    entries = [entry("new", hour=3), entry("old", hour=1), entry("middle", hour=2)]
    assert keys(removable(entries)) == ["old", "middle", "new"]
    assert keys(removable(entries, max_bytes=20)) == ["old"]
    assert keys(removable(entries, max_bytes=30)) == []


def test_what_is_in_use_or_was_used_lately_stays() -> None:
    """Whatever the bound says."""
    entries = [entry("used", hour=0, in_use=True), entry("late", hour=9), entry("old", hour=1)]
    assert keys(removable(entries, max_bytes=0, used_before=at(9))) == ["old"]


def test_a_folder_goes_before_its_files() -> None:
    """A file that is older than its folder waits for it, and one of two folders waits for both."""
    entries = [entry("a", parts=("x", "y"), hour=5), entry("b", parts=("y",), hour=6), entry("x"), entry("y")]
    assert keys(removable(entries)) == ["a", "x", "b", "y"]
    kept = [entry("a", parts=("x", "y"), hour=5), entry("b", parts=("y",), in_use=True), entry("x"), entry("y")]
    assert keys(removable(kept)) == ["a", "x"]


_FILES = "pqrstu"
_files = st.tuples(*(st.tuples(st.integers(0, 50), st.integers(0, 9), st.booleans()) for _ in _FILES))
_folders = st.lists(
    st.tuples(st.sets(st.sampled_from(_FILES), min_size=1), st.integers(0, 9), st.booleans()), max_size=4
)


@given(_files, _folders, st.none() | st.integers(0, 300), st.none() | st.integers(0, 10))
def test_what_stays_is_whole_and_no_larger_than_it_must_be(
    files: tuple[tuple[int, int, bool], ...],
    folders: list[tuple[set[str], int, bool]],
    max_bytes: int | None,
    hour: int | None,
) -> None:
    """No part of a folder that stays goes, nothing that must stay goes, and what may go stays only within the bound."""
    entries = [entry(name, *rest[:2], in_use=rest[2]) for name, rest in zip(_FILES, files, strict=True)]
    entries += [
        entry(f"folder {i}", 1, when, tuple(parts), in_use=used) for i, (parts, when, used) in enumerate(folders)
    ]
    used_before = None if hour is None else at(hour)
    gone = removable(entries, max_bytes=max_bytes, used_before=used_before)
    left = [each for each in entries if each not in gone]
    parts = {part for each in left for part in each.parts}
    assert len(set(keys(gone))) == len(gone)
    assert not parts & set(keys(gone))
    assert not any(each.in_use for each in gone)
    assert used_before is None or all(each.last_use < used_before for each in gone)
    if max_bytes is None or sum(each.size for each in left) > max_bytes:
        free = [each for each in left if not each.in_use and each.key not in parts]
        assert all(used_before is not None and each.last_use >= used_before for each in free)
