"""Threads with room for a model on their stack."""

from __future__ import annotations

import threading
from typing import Final

_ENOUGH: Final = 8 << 20  # bytes; the default of Linux
_changing: Final = threading.Lock()


def start(thread: threading.Thread) -> None:
    """Start a thread that may run a model, with a stack of 8 MiB also where the host has set less for its threads.

    Numerical libraries end the process where there is too little. Python has one size for all threads to come, so a
    smaller one is raised for the moment of the start.
    """
    with _changing:
        size = threading.stack_size()
        if not 0 < size < _ENOUGH:
            thread.start()
            return
        threading.stack_size(_ENOUGH)
        try:
            thread.start()
        finally:
            threading.stack_size(size)
