"""What lies in a disk cache, and what of it may go. Nothing here touches the disk."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections import Counter
from collections.abc import Collection
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One thing in the cache: a file, a folder (its manifest alone), or a file that was set aside as damaged.

    ``size`` is in bytes and without that of ``parts``, the keys of the files that a folder consists of. ``in_use``: a
    process of this machine has it, or a folder of which it is a part, loaded or is fetching it.
    """

    key: str
    kind: Literal["file", "folder", "quarantined"]
    size: int
    last_use: dt.datetime
    in_use: bool
    parts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What became of one thing in the cache whose bytes were hashed; what is not ``sound`` was taken out of it."""

    key: str
    size: int
    sound: bool


def removable(
    entries: Collection[CacheEntry], *, max_bytes: int | None = None, used_before: dt.datetime | None = None
) -> list[CacheEntry]:
    """Return what to remove, in order: what was used longest ago first, and a folder before its parts.

    Nothing goes that is in use, that was used since ``used_before``, or that is part of a folder that stays; and
    nothing more once the rest takes no more than ``max_bytes``.
    """
    total = sum(each.size for each in entries)
    folders = Counter(part for each in entries for part in set(each.parts))
    waiting = [each for each in sorted(entries, key=_age) if _may_go(each, used_before)]
    chosen: list[CacheEntry] = []
    while max_bytes is None or total > max_bytes:
        found = next((each for each in waiting if not folders[each.key]), None)
        if found is None:
            break
        waiting.remove(found)
        chosen.append(found)
        total -= found.size
        folders.subtract(set(found.parts))
    return chosen


def _age(entry: CacheEntry) -> tuple[dt.datetime, bool, str]:
    return entry.last_use, not entry.parts, entry.key


def _may_go(entry: CacheEntry, used_before: dt.datetime | None) -> bool:
    return not entry.in_use and (used_before is None or entry.last_use < used_before)
