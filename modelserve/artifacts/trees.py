"""Folder artifacts on the local disk: made of hard links to files that were hashed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from modelserve.artifacts import blob, files
from modelserve.artifacts.eviction import BACKEND, Eviction
from modelserve.artifacts.fetching import PATIENCE_S, ROUNDS, Fetching, Task
from modelserve.artifacts.holdings import OfThisProcess
from modelserve.artifacts.layout import Layout, is_tree
from modelserve.errors import BackendUnavailable


class Trees:
    """Folders by the keys of their manifests."""

    def __init__(self, layout: Layout, of_this_process: OfThisProcess, eviction: Eviction, fetching: Fetching) -> None:
        self._layout = layout
        self._of_this_process = of_this_process
        self._eviction = eviction
        self._fetching = fetching

    def make(self, task: Task, key: str, manifest: IO[bytes]) -> Path:
        """Return the folder of a manifest, made of sound files; what is there is kept only if it is the same."""
        entries = blob.decode_manifest(b"".join(files.chunks(manifest)))
        tree = self._layout.tree(key)
        self._eviction.lend_replica(key, self._missing(entries))
        with files.draft_folder(self._layout.temp) as draft:
            for entry in entries:
                self._link(task, entry, draft)
            self._put(draft, tree, entries)
        return tree

    def _missing(self, entries: Sequence[blob.Entry]) -> int:
        sizes = {each.sha256: each.size for each in entries}
        return sum(size for sha256, size in sizes.items() if not self._layout.path(blob.blob_key(sha256)).exists())

    def _link(self, task: Task, entry: blob.Entry, folder: Path) -> None:
        key, target = blob.blob_key(entry.sha256), folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._of_this_process().lock_of(key), self._fetching.acquire(task, key, entry.size):
            os.link(self._layout.path(key), target)

    def _put(self, draft: Path, tree: Path, entries: Sequence[blob.Entry]) -> None:
        """Give the draft its final name. A folder that has it is removed only if it is not the same: others use it."""
        tree.parent.mkdir(parents=True, exist_ok=True)
        with files.turn(self._layout.temp, f"trees-{tree.name}", PATIENCE_S):
            for _ in range(ROUNDS):
                with contextlib.suppress(OSError):  # no folder takes the name of another that has something in it
                    draft.rename(tree)
                    return
                if _is_same(tree, draft, entries):
                    return
                self._layout.remove_tree(tree)
        raise BackendUnavailable(BACKEND, f"{tree} cannot be put in place")


def _is_same(tree: Path, draft: Path, entries: Sequence[blob.Entry]) -> bool:
    """Whether a folder has the draft's files: hard links of the same ones, or, of two downloads at once, equal ones."""
    try:
        return is_tree(tree, entries, {entry.path: draft / entry.path for entry in entries})
    except OSError:  # not there, or taken away by another process at this moment
        return False
