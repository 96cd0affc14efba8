"""What leaves a disk cache for lack of room: what is not in use, used longest ago first."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import Final

from modelserve.artifacts import blob, files
from modelserve.artifacts.holdings import OfThisProcess
from modelserve.artifacts.layout import Layout, OnDisk
from modelserve.errors import BackendUnavailable

_log = logging.getLogger("modelserve")
BACKEND: Final = "artifact cache"
ROOM: Final = "make room with `modelserve cache prune`, or set cache_bytes so that what is not in use may go by itself"


class Eviction:
    """Keeps a cache within ``max_bytes`` (None: no bound). What ``spared()`` names goes last."""

    def __init__(
        self,
        layout: Layout,
        of_this_process: OfThisProcess,
        *,
        max_bytes: int | None,
        spared: Callable[[], Collection[str]],
    ) -> None:
        self._layout = layout
        self._of_this_process = of_this_process
        self._max_bytes = max_bytes
        self.spared = spared

    def evict(self) -> None:
        """Remove what was used longest ago until ``max_bytes`` hold. What cannot be removed fails no fetch."""
        if self._max_bytes is not None:
            found = list(self._layout.on_disk())
            self._free(found, sum(each.size for each in found) - self._max_bytes)

    def lend_replica(self, key: str, size: int) -> None:
        """See to it that the disk can take so many bytes more. Only a cache that may evict does so for it.

        Raises ``BackendUnavailable`` that says how much is missing: before a download, which would end with the disk
        full to the last byte for everybody.
        """
        missing = size - self._free_bytes()
        if missing > 0 and self._max_bytes is not None:
            self._free(list(self._layout.on_disk()), missing)
            missing = size - self._free_bytes()
        if missing > 0:
            problem = f"{key} takes {size} bytes, which is {missing} more than the disk has free; {ROOM}"
            raise BackendUnavailable(BACKEND, problem)

    def is_removed(self, key: str) -> bool:
        """Remove a file unless it is in use. Afterwards it may be gone because another process removed it."""
        with self._of_this_process().unless_used(key) as unused:
            try:
                return unused and self._is_removed_alone(key)
            except FileNotFoundError:
                return True
            except OSError:
                _log.exception("the artifact cache cannot remove %s", key)
                return False

    def _free(self, found: Sequence[OnDisk], wanted: int) -> None:
        """Remove what is not in use, what is spared last and used longest ago first, until that many bytes are gone."""
        if wanted <= 0:
            return
        spared = self.spared()
        for each in sorted(found, key=lambda each: (each.key in spared, each.last_use_ns)):
            if wanted <= 0:
                return
            if self.is_removed(each.key):
                wanted -= each.size

    def _free_bytes(self) -> int:
        self._layout.temp.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._layout.temp).free

    def _is_removed_alone(self, key: str) -> bool:
        path = self._layout.path(key)
        with files.claim(path) as free:
            if not free or path.stat().st_nlink > 1:  # a tree still has the bytes of a blob with two names
                return False
            if blob.is_manifest(key):
                self._layout.remove_tree(self._layout.tree(key))
            path.unlink()
            return True
