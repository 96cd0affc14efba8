"""Memory that a host and its worker share: a file without a name, mapped by both.

It never appears under ``/dev/shm`` or anywhere else, so nothing is left behind however either side ends: the kernel
frees it with its last descriptor and mapping.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from typing import Final, Self

from modelserve.execution.descriptors import lifted

_GRAIN: Final = 1 << 20


class Arena:
    """A growing block of shared memory, written by one side and read in place by the other.

    One side creates it and the other opens the inherited descriptor. What was mapped stays valid for as long as an
    array refers to it, also after the arena has grown or was closed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> Self:
        """Make an empty arena with a descriptor that can be inherited by name of its number."""
        if hasattr(os, "memfd_create"):
            fd = lifted(os.memfd_create("modelserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            # A reader of a file that shrinks under its mapping dies of a bus error; the kernel forbids it from here on.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            return cls(fd)
        with tempfile.TemporaryFile() as file:
            return cls(lifted(os.dup(file.fileno())))

    def block(self, size: int) -> memoryview:
        """Return the first ``size`` bytes to write into; the arena grows as needed."""
        if self._map is None or len(self._map) < size:
            grown = -(-size // _GRAIN) * _GRAIN
            if os.fstat(self.fd).st_size < grown:
                os.ftruncate(self.fd, grown)
            self._map = mmap.mmap(self.fd, grown)
        return memoryview(self._map)[:size]

    def read(self, size: int) -> memoryview:
        """Return the first ``size`` bytes that the other side wrote. Raises ``ValueError`` if there are not so many."""
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self.fd, 0) if os.fstat(self.fd).st_size >= size else None
        if self._map is None:
            raise ValueError(f"the arena does not hold {size} bytes")
        return memoryview(self._map)[:size]

    def close(self) -> None:
        """Give the descriptor back; safe to call twice."""
        self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
