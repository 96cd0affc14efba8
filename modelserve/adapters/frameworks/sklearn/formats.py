"""What one format of an estimator is to the adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from modelserve.types import Json, Runtime

CATEGORIES: Final = (
    "it was fitted on a pandas category, which it knows by a number that no request carries; fit it on numbers of your "
    "own (frame[column].cat.codes, with categorical_feature= or feature_types=), or behind an OrdinalEncoder"
)
"""Why a booster cannot be served that goes by the categories of the frame that it was fitted on."""


class Format(ABC):
    """Writes and reads estimators in one way."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    runs_code: ClassVar[bool] = False

    @abstractmethod
    def write(self, estimator: Any, path: Path) -> dict[str, Json]:
        """Write an estimator; return what :meth:`inspect` could not know of it."""

    @abstractmethod
    def inspect(self, path: Path, options: Mapping[str, Json]) -> dict[str, Json]:
        """Look at a file without loading it; return what :meth:`read` needs to be told."""

    @abstractmethod
    def read(self, data: bytes, load_options: Mapping[str, Json], runtime: Runtime) -> Any:
        """Read the estimator again from the bytes of its file. Raises ``LoadError``."""
