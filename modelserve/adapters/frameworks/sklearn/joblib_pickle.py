"""The format ``joblib``: a pickle, which can run any code when it is loaded."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn.formats import Format
from modelserve.errors import ArtifactUnsafe, LoadFailed
from modelserve.types import Json, Runtime

_LEFT_IN_MAIN: Final = re.compile(r"Can't get attribute '([\w.]+)' on <module '([\w.]+)'")


class JoblibPickle(Format):
    """Estimators as pickles, for those whom no safe format can hold."""

    name = "joblib"
    suffixes = (".joblib", ".pkl", ".pickle")
    runs_code = True

    def write(self, estimator: Any, path: Path) -> dict[str, Json]:
        """Pickle an estimator."""
        plugins.require("joblib").dump(estimator, path)
        return {}

    def inspect(self, path: Path, options: Mapping[str, Json]) -> dict[str, Json]:  # noqa: ARG002
        """Nothing is known of a pickle before it is loaded."""
        return {}

    def read(self, data: bytes, load_options: Mapping[str, Json], runtime: Runtime) -> Any:  # noqa: ARG002
        """Unpickle an estimator, where that is allowed."""
        if not runtime.allow_pickle:
            raise ArtifactUnsafe(
                "the artifact is a pickle (format 'joblib'): it can run any code when it is loaded, so it is refused "
                "by default; if you trust whoever registered it, serve the model with ModelOptions(allow_pickle=True)"
            )
        try:
            return plugins.require("joblib").load(io.BytesIO(data))
        except AttributeError as error:
            missing = _LEFT_IN_MAIN.search(str(error))
            if missing is None or missing[2] not in {
                "__main__",
                getattr(sys.modules["__main__"].__spec__, "name", None),
            }:
                raise LoadFailed(f"joblib cannot read the artifact: {error}") from error
            raise LoadFailed(
                f"the artifact needs the class {missing[1]!r} of the script or notebook that registered it; define it "
                "in a module that can be imported where the model is served, and register again"
            ) from error
        except Exception as error:
            raise LoadFailed(f"joblib cannot read the artifact: {type(error).__name__}: {error}") from error
