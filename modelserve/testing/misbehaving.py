"""A framework whose models do what a test tells them to: answer in every form, or go wrong in every way.

``format`` names the model. :data:`PATH` is the dotted path of the adapter, for use in another process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from modelserve.errors import ArtifactUnsafe
from modelserve.ports import Model, SavedModel
from modelserve.types import SAFE, SOLE_OUTPUT, Columns, FrameworkName, Json, Runtime

PATH: Final = "modelserve.testing.misbehaving:Misbehaving"


class Misbehaving:
    """Loads models of its own making; there is nothing to save."""

    name: FrameworkName = "sklearn"

    def save(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns | None = None) -> SavedModel:
        """Refuse: what these models are is in their name."""
        raise NotImplementedError

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> Model:
        """Refuse, like :meth:`save`."""
        raise NotImplementedError

    def load(
        self,
        path: Path,  # noqa: ARG002  # the model is its format's name
        format: str,  # noqa: A002
        load_options: Mapping[str, Json],
        runtime: Runtime = SAFE,  # noqa: ARG002
    ) -> Model:
        """Make the model named ``format``, after doing what ``load_options["first"]`` says."""
        first = load_options.get("first")
        if first is not None:
            _AT_LOAD[first](load_options)
        return _Calling(_MODELS[format])


class _Calling:
    def __init__(self, infer: Callable[[Columns], Columns]) -> None:
        self.infer = infer


# -- while it loads ----------------------------------------------------------------------------------------


def _refuse(_: Mapping[str, Json]) -> NoReturn:
    raise ArtifactUnsafe("not without allow_pickle")


def _fail(_: Mapping[str, Json]) -> NoReturn:
    raise RuntimeError("no weights")


def _leave(_: Mapping[str, Json]) -> NoReturn:
    sys.exit(3)


def _die(_: Mapping[str, Json]) -> NoReturn:
    os._exit(3)


def _hang(_: Mapping[str, Json]) -> None:
    time.sleep(1000)


def _fail_while(options: Mapping[str, Json]) -> None:
    """Fail as long as a file exists."""
    if Path(options["file"]).exists():
        raise RuntimeError("still no weights")


_AT_LOAD: Final[dict[str, Callable[[Mapping[str, Json]], None]]] = {
    "refuse": _refuse,
    "fail": _fail,
    "exit": _leave,
    "die": _die,
    "hang": _hang,
    "fail while": _fail_while,
}


# -- models that answer ------------------------------------------------------------------------------------


def _echo(columns: Columns) -> Columns:
    return columns


def _double(columns: Columns) -> Columns:
    return {SOLE_OUTPUT: columns["x"] * 2}


def _in_place(columns: Columns) -> Columns:
    x = columns["x"]
    x *= 2
    return {SOLE_OUTPUT: x}


def _strings(columns: Columns) -> Columns:
    return {SOLE_OUTPUT: np.array([f"<{value}>" for value in columns["x"]])}


def _objects(columns: Columns) -> Columns:
    values: list[Any] = [{"value": float(value), "none": None, "many": [1, "two"]} for value in columns["x"]]
    answer = np.empty(len(values), dtype=object)
    answer[:] = values
    return {SOLE_OUTPUT: answer}


def _several(columns: Columns) -> Columns:
    x = columns["x"]
    return {"double": x * 2, "label": np.where(x > 0, "up", "down"), "pair": np.stack([x, -x], axis=1)}


def _complex(columns: Columns) -> Columns:
    return {SOLE_OUTPUT: columns["x"] * 1j}


def _sets(columns: Columns) -> Columns:
    answer = np.empty(len(columns["x"]), dtype=object)
    answer[:] = [{1, 2} for _ in columns["x"]]
    return {SOLE_OUTPUT: answer}


def _one_more(columns: Columns) -> Columns:
    return {SOLE_OUTPUT: np.zeros(len(columns["x"]) + 1)}


def _imported(columns: Columns) -> Columns:
    return {SOLE_OUTPUT: np.array([" ".join(sorted(sys.modules)) for _ in columns["x"]])}


def _environment(columns: Columns) -> Columns:
    told = {"niceness": os.nice(0), "threads": os.environ.get("OMP_NUM_THREADS"), "path": sys.path}
    answer = np.empty(len(columns["x"]), dtype=object)
    answer[:] = [told for _ in columns["x"]]
    return {SOLE_OUTPUT: answer}


def _gated(columns: Columns) -> Columns:
    """Answer once the file named by the string input ``gate`` exists; make the one named by ``started`` first."""
    Path(columns["started"][0]).touch()
    while not Path(columns["gate"][0]).exists():
        time.sleep(0.001)
    return _double(columns)


# -- rows that go wrong ------------------------------------------------------------------------------------

RAISE, SEGFAULT, KILLED, LOOP, EXIT, GONE, GARBAGE, LIE, MEMORY, STUCK, DEAF = range(-1, -12, -1)


def _raise() -> NoReturn:
    raise ValueError("a bad row")


def _segfault() -> None:
    ctypes.string_at(0)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _loop() -> NoReturn:
    while True:
        pass


def _garbage() -> None:
    os.write(_socket(), b"what is this? " * 100)


def _lie() -> None:
    """Send an answer that describes a column outside of its block, in time before the true one."""
    from modelserve.execution import wire  # noqa: PLC0415  # only a worker that lies needs to know the protocol

    text = b'[["output", "<f8", [1], 4096]]'
    for seq in range(1, 10_000):
        os.write(_socket(), wire.frame(wire.ANSWER, text=text, seq=seq, rows=1))


def _memory() -> None:
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        np.ones(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _stuck() -> None:
    """Hold the interpreter lock for a long time."""
    ctypes.PyDLL(None).sleep(1000)


def _deaf() -> None:
    """Close the socket and live on."""
    os.close(_socket())
    time.sleep(1000)


def _socket() -> int:
    return int(sys.argv[2])


_FAULTS: Final[dict[int, Callable[[], object]]] = {
    RAISE: _raise,
    SEGFAULT: _segfault,
    KILLED: _killed,
    LOOP: _loop,
    EXIT: lambda: sys.exit(3),
    GONE: lambda: os._exit(3),
    GARBAGE: _garbage,
    LIE: _lie,
    MEMORY: _memory,
    STUCK: _stuck,
    DEAF: _deaf,
}


def _touchy(columns: Columns) -> Columns:
    """Double every row, in a few milliseconds; a row that is one of the faults above does that first."""
    time.sleep(0.002)
    for value in columns["x"]:
        fault = _FAULTS.get(int(value))
        if fault is not None:
            fault()
    return _double(columns)


_MODELS: Final[dict[str, Callable[[Columns], Columns]]] = {
    "echo": _echo,
    "double": _double,
    "in place": _in_place,
    "strings": _strings,
    "objects": _objects,
    "several": _several,
    "complex": _complex,
    "sets": _sets,
    "one more": _one_more,
    "imported": _imported,
    "environment": _environment,
    "gated": _gated,
    "touchy": _touchy,
}
