"""Descriptors that keep away from the numbers of the standard streams.

A host that has closed a stream gets its number for the next file it opens, and what is printed would be written there.
"""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Final

_FIRST_FREE: Final = 3


def lifted(fd: int) -> int:
    """Return a descriptor, moved to another number if it had that of a stream."""
    if fd >= _FIRST_FREE:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    finally:
        os.close(fd)


def lifted_socket(connection: socket.socket) -> socket.socket:
    """Return a socket whose descriptor is :func:`lifted`."""
    if connection.fileno() >= _FIRST_FREE:
        return connection
    return socket.socket(fileno=lifted(connection.detach()))
