"""What a worker process inherits from its host.

A child gets the process-wide state of its parent, which a host may have changed for reasons of its own. What the
operator sets for all processes (environment, limits, priority, cores, umask) reaches a worker as it is. What would keep
a worker from starting, or have it run the model otherwise than the host does, is put right here and in the worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from modelserve.errors import LoadFailed
from modelserve.execution.cores import thread_limits
from modelserve.types import Runtime

_DEFAULTS: Final = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # what the processor can do is nothing for the log of the host; errors are
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # or the first of several workers takes all of a GPU's memory
}
_FLAGS: Final = {"optimize": "-O", "dont_write_bytecode": "-B", "no_user_site": "-s", "no_site": "-S"}
_INTERPRETERS: Final = ("python", "pypy", "graalpy")


def interpreter() -> str:
    """Return the path of the Python that runs the host, also where another program embeds it.

    Raises ``LoadFailed`` when there is none to be found.
    """
    named = sys.executable or ""
    if any(name in os.path.basename(named).lower() for name in _INTERPRETERS):  # noqa: PTH119  # no path to work with
        return named
    beside = f"{sys.prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    if os.access(beside, os.X_OK):
        return beside
    raise LoadFailed(
        f"a worker process needs a Python interpreter, but sys.executable is {named!r} and there is no {beside}; "
        'set sys.executable to one, or use executor="thread"'
    )


def flags() -> list[str]:
    """Return the interpreter's flags that the host runs with, as far as they change what a model does."""
    given = [flag for name, flag in _FLAGS.items() for _ in range(getattr(sys.flags, name))]
    given += [f"-W{option}" for option in sys.warnoptions]
    if sys.flags.dev_mode:
        given += ["-X", "dev"]
    if sys.getfilesystemencoding() == "utf-8":  # paths are handed over as text, and have to mean the same bytes
        given += ["-X", "utf8"]
    return [*given, "-P"]


def environment(runtime: Runtime) -> dict[str, str]:
    """Return the host's environment, with its import path, limits on threads, and the devices it may see."""
    inherited = {name: value for name, value in os.environ.items() if not _misleads(name, value)}
    limits = {} if runtime.threads is None else thread_limits(runtime.threads, inherited)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if runtime.device == "cpu" else {}  # a context costs memory of the GPU
    return {**_DEFAULTS, **inherited, **limits, **hidden, "PYTHONPATH": _import_path()}


def folder() -> str | None:
    """Return where a worker has to be started: None for the host's own folder, the root if that was deleted."""
    try:
        os.getcwd()  # noqa: PTH109  # to see whether there is one
    except OSError:
        return os.sep
    return None


def stream(fd: int) -> int | None:
    """Return what a worker writes to as this standard stream: None for the host's own, or nothing where that is closed.

    Its number may be that of another file by then, which is not handed on.
    """
    try:
        return None if os.get_inheritable(fd) else subprocess.DEVNULL
    except OSError:
        return subprocess.DEVNULL


def _misleads(name: str, value: str) -> bool:
    """Whether the worker's interpreter would obey a variable that the host's own does not."""
    if name == "PYTHONHOME":
        return os.path.realpath(value.partition(os.pathsep)[0]) != os.path.realpath(sys.base_prefix)
    return name.startswith("PYTHON") and bool(sys.flags.ignore_environment)


def _import_path() -> str:
    """Return where the host finds its modules: what its interpreter heeds, and an environment can carry."""
    entries = [entry for entry in sys.path if isinstance(entry, str) and os.pathsep not in entry]
    if folder() is not None:
        entries = list(filter(os.path.isabs, entries))
    return os.pathsep.join(map(os.path.abspath, entries))
