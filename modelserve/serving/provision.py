"""What a version loads, kept on the local disk for as long as it is loaded, and hashed around every start of a replica.

Frameworks open files by name, and what lies under a name can change at any time. So it is hashed before a start, and
fetched again if it is damaged or gone. It is hashed after the start too, and a replica that may have read anything
else is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from modelserve.artifacts import Lease
from modelserve.errors import ArtifactCorrupt
from modelserve.types import Artifact


class Provision:
    """An artifact on the local disk, as it was fetched: ``lease``, until it is closed.

    ``fetch`` hashes what is there, and replaces what does not hash to its name. Replicas that start at once share a
    hash: one serves all who asked before it began.
    """

    def __init__(self, artifact: Artifact, lease: Lease, fetch: Callable[[], Awaitable[Lease]]) -> None:
        self._artifact = artifact
        self._lease = lease
        self._fetch = fetch
        self._turn = asyncio.Lock()
        self._begun = self._sound = 0  # the number of the last check that began, and of the last that succeeded

    @property
    def path(self) -> Path:
        """The file or folder; it stays the same when it is fetched again."""
        return self._lease.path

    async def check(self) -> Lease:
        """Hash all of it from now on, or fetch it again. Raises what :meth:`DiskCache.fetch` does."""
        asked = self._begun
        async with self._turn:
            if self._sound <= asked:
                # The replicas of a new pool ask in one turn of the loop, and share one hash.
                await asyncio.sleep(0)
                self._begun += 1
                began = self._begun
                before, self._lease = self._lease, await self._fetch()
                before.release()
                self._sound = began
            return self._lease

    @contextlib.asynccontextmanager
    async def intact(self) -> AsyncIterator[None]:
        """Surround a start: have the files there and sound before it, and raise unless they still are after it."""
        before = await self.check()
        yield
        if (await self.check()).files != before.files:
            changed = "that its files were changed while a replica loaded them"
            raise ArtifactCorrupt(self._artifact.key, self._artifact.sha256, changed)

    def close(self) -> None:
        """Let it be evicted. Call it when no replica is left, and none is started any more."""
        self._lease.release()
