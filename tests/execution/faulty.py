"""Models that are wrong in rarer ways than those of :mod:`modelserve.testing.misbehaving`, and loads that wait.

Importable in a worker: ``PATH`` is what it resolves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NoReturn

import numpy as np

from modelserve.ports import Model
from modelserve.testing.misbehaving import Misbehaving
from modelserve.types import SAFE, SOLE_OUTPUT, Columns, Json, Runtime

PATH: Final = "tests.execution.faulty:FaultyFramework"
FINE, FAULT = 0.0, 1.0


class FaultyFramework(Misbehaving):
    """Loads the models below, and all of :class:`Misbehaving`; ``load_options["gate"]`` names a file to wait for."""

    def load(
        self,
        path: Path,
        format: str,  # noqa: A002
        load_options: Mapping[str, Json],
        runtime: Runtime = SAFE,
    ) -> Model:
        """Make the model named ``format``, once the gate is open if there is one."""
        gate = load_options.get("gate")
        while gate is not None and not Path(gate).exists():
            time.sleep(0.001)
        if format in _MODELS:
            return _Odd(_MODELS[format])
        return super().load(path, format, load_options, runtime)


class _Odd:
    """Doubles its input, and does the odd thing for a batch that begins with ``FAULT``."""

    def __init__(self, odd: Callable[[Columns], Columns]) -> None:
        self._odd = odd

    def infer(self, columns: Columns) -> Columns:
        return self._odd(columns) if columns["x"][0] == FAULT else {SOLE_OUTPUT: columns["x"] * 2}


def _too_large(columns: Columns) -> Columns:
    """Answer what costs nothing to describe, and more than any memory to write down."""
    return {SOLE_OUTPUT: np.broadcast_to(np.float64(1.0), (len(columns["x"]), 2**40))}


def _no_words(_: Columns) -> NoReturn:
    """Raise what cannot say what it is."""

    class Wordless(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    raise Wordless


def _special(columns: Columns) -> Columns:
    """Answer the floats that are easily lost on the way."""
    special = np.array([-0.0, 5e-324, np.inf, -np.inf, np.nan, 0.1 + 0.2, 2.0**53 + 2])
    return {SOLE_OUTPUT: np.tile(special, (len(columns["x"]), 1))}


def _surroundings(columns: Columns) -> Columns:
    """Answer what a worker finds around it."""
    mask = os.umask(0)
    os.umask(mask)
    found = {
        "folder": str(Path.cwd()),
        "umask": mask,
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "children": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
        "optimize": sys.flags.optimize,
        "dev": sys.flags.dev_mode,
        "warnings": sys.warnoptions,
        "encoding": sys.getfilesystemencoding(),
        "path": sys.path,
        "streams": [os.fstat(fd).st_mode > 0 for fd in range(3)],
    }
    answer = np.empty(len(columns["x"]), dtype=object)
    answer[:] = [found] * len(answer)
    return {SOLE_OUTPUT: answer}


_MODELS: Final[dict[str, Callable[[Columns], Columns]]] = {
    "too large": _too_large,
    "no words": _no_words,
    "special": _special,
    "surroundings": _surroundings,
}
