"""What one format of a network is to the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from modelserve.adapters.frameworks.pytorch.calls import Callee
from modelserve.types import Columns, Json, Runtime


class Format(Protocol):
    """Writes and reads networks in one way."""

    name: str
    suffixes: tuple[str, ...]

    def write(self, model: Any, path: Path, call: str | None, example: Columns | None) -> None:
        """Write a live model. Raises ``InvalidInput`` for one that this format cannot hold."""
        ...

    def read(self, path: Path, load_options: Mapping[str, Json], runtime: Runtime) -> Callee:
        """Read it again, on the device of ``runtime`` and in eval mode. Raises ``LoadError``."""
        ...
