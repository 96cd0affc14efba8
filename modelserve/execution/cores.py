"""How many threads a worker's numerical libraries may start, so that workers do not fight over the cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

# Read by the libraries when they are loaded, so they have to be in a worker's environment from the start.
_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "LOKY_MAX_CPU_COUNT",
)


def share_of(replicas: int) -> int:
    """Return how many threads each of so many replicas may have, so that all of them stay within the cores."""
    return max(1, cores() // replicas)


def thread_limits(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that hold a process to so many threads; a lower limit that is set already stays."""
    return {name: str(min(threads, _limit(environment.get(name)) or threads)) for name in _VARIABLES}


def cores() -> int:
    """Return how many cores this process may use: its affinity, cut by the quota of its control group."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(float, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split())
        usable = min(usable, max(1, round(quota / period)))
    return usable


def _limit(value: str | None) -> int:
    return int(value) if value is not None and value.isdecimal() else 0
