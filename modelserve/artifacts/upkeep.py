"""Looking after a disk cache: what lies there, what of it may go, and whether its bytes are still good."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Iterator
from pathlib import Path

from modelserve.artifacts import blob, files
from modelserve.artifacts.eviction import Eviction
from modelserve.artifacts.holdings import OfThisProcess
from modelserve.artifacts.layout import Layout, OnDisk, is_sound, is_tree
from modelserve.artifacts.pruning import CacheEntry, Examined, removable
from modelserve.errors import LoadFailed


class Upkeep:
    """Lists, prunes and verifies."""

    def __init__(self, layout: Layout, of_this_process: OfThisProcess, eviction: Eviction) -> None:
        self._layout = layout
        self._of_this_process = of_this_process
        self._eviction = eviction

    def entries(self) -> list[CacheEntry]:
        """Return what lies there, by key."""
        parts = {each.key: self._parts(each.key) for each in self._layout.on_disk() if blob.is_manifest(each.key)}
        used = {each.key for each in self._layout.on_disk() if self._is_used(each.key)}
        used |= {part for key in used for part in parts.get(key, ())}
        found = [
            CacheEntry(
                key=each.key,
                kind="folder" if blob.is_manifest(each.key) else "file",
                size=each.size,
                last_use=_moment(each.last_use_ns),
                in_use=each.key in used,
                parts=parts.get(each.key, ()),
            )
            for each in self._layout.on_disk()
        ]
        return sorted([*found, *self._set_aside()], key=lambda each: each.key)

    def prune(
        self, *, max_bytes: int | None, used_before: dt.datetime | None, spare: bool, dry_run: bool
    ) -> list[CacheEntry]:
        """Remove what may go; return what was removed, or would be."""
        spared = self._eviction.spared() if spare else ()
        entries = [dataclasses.replace(each, in_use=each.in_use or each.key in spared) for each in self.entries()]
        planned = removable(entries, max_bytes=max_bytes, used_before=used_before)
        return planned if dry_run else [each for each in planned if self._is_pruned(each)]

    def verify(self) -> list[Examined]:
        """Hash everything; take out what is not sound."""
        found = [self._examined(each) for each in self._layout.on_disk()]
        trees = [self._examined_tree(path) for path in self._layout.trees.glob("*")]
        return sorted([each for each in [*found, *trees] if each is not None], key=lambda each: each.key)

    def _parts(self, key: str) -> tuple[str, ...]:
        try:
            entries = blob.decode_manifest(self._layout.path(key).read_bytes())
        except (OSError, LoadFailed):  # gone, or damaged: then it holds nothing
            return ()
        return tuple(sorted({blob.blob_key(entry.sha256) for entry in entries}))

    def _is_used(self, key: str) -> bool:
        try:
            with self._of_this_process().unless_used(key) as unused, files.claim(self._layout.path(key)) as free:
                return not (unused and free)
        except FileNotFoundError:
            return False
        except OSError:  # a process that may not even open it does not know
            return True

    def _set_aside(self) -> Iterator[CacheEntry]:
        for path in self._layout.quarantine.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield CacheEntry(
                    key=f"quarantine/{path.name}",
                    kind="quarantined",
                    size=status.st_size,
                    last_use=_moment(status.st_mtime_ns),
                    in_use=False,
                )

    def _is_pruned(self, entry: CacheEntry) -> bool:
        if entry.kind != "quarantined":
            return self._eviction.is_removed(entry.key)
        self._layout.path(entry.key).unlink(missing_ok=True)
        return True

    def _examined(self, found: OnDisk) -> Examined | None:
        held = files.hold(self._layout.path(found.key))
        if held is None:
            return None
        sound = is_sound(found.key, held)
        held.close() if sound else self._layout.set_aside(found.key, held)
        return Examined(key=found.key, size=found.size, sound=sound)

    def _examined_tree(self, tree: Path) -> Examined | None:
        """A file of a folder is a second name of one that was examined, or is hashed by itself."""
        manifest = self._layout.path(blob.manifest_key(tree.name))
        try:
            entries = blob.decode_manifest(manifest.read_bytes())
            size = sum(entry.size for entry in entries)
            examined = {entry.path: self._layout.path(blob.blob_key(entry.sha256)) for entry in entries}
            sound = is_tree(tree, entries, examined)
        except (OSError, LoadFailed):
            size, sound = 0, False
        if not sound:
            self._layout.remove_tree(tree)
        return Examined(key=f"trees/sha256/{tree.name}", size=size, sound=sound)


def _moment(time_ns: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(time_ns / 1e9, tz=dt.UTC)
