"""scikit-learn: estimators and pipelines, saved by skops (no pickle) unless pickle is asked for and allowed.

The ``skops`` format is a zip of JSON and arrays; types outside its own allow-list are loaded only when they are on
the list of trusted types that was written down at registration. The ``joblib`` format is a pickle.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.errors import ArtifactUnsafe, InferenceFailed, InvalidInput, LoadFailed
from modelserve.types import SOLE_OUTPUT, Array, Columns, FrameworkName, Json

# What scikit-learn's own estimators are made of beyond skops's list: arrays behind a C structure and plain helper
# objects. skops leaves them to the caller's judgement because forged arrays could crash the process; here the
# SHA-256 that the registry pinned stands between a forger and the loader.
_PARTS_OF_SKLEARN: Final = frozenset(
    {
        "numpy.dtype",
        "sklearn._loss.loss.HalfTweedieLossIdentity",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.compose._column_transformer.make_column_selector",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
        "sklearn.gaussian_process.kernels.ConstantKernel",
        "sklearn.gaussian_process.kernels.Product",
        "sklearn.gaussian_process.kernels.RBF",
        "sklearn.metrics._dist_metrics.EuclideanDistance64",
        "sklearn.neighbors._kd_tree.KDTree",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
    }
)
_LEFT_IN_MAIN: Final = re.compile(r"Can't get attribute '([\w.]+)' on <module '([\w.]+)'")
_FORMAT_OF_SUFFIX: Final = {".skops": "skops", ".joblib": "joblib", ".pkl": "joblib", ".pickle": "joblib"}


@dataclasses.dataclass(frozen=True, slots=True)
class SavedEstimator:
    """Where an estimator was written, in which format, and what loads it again."""

    path: Path
    format: str
    load_options: Mapping[str, Json]


class SklearnFramework:
    """The scikit-learn adapter of :class:`modelserve.ports.Framework`."""

    name: FrameworkName = "sklearn"

    def save(self, model: Any, folder: Path, options: Mapping[str, Json]) -> SavedEstimator:
        """Write an estimator, or take the file at a path as it is.

        ``options``: ``method`` (default ``predict``), ``trusted`` (type names), ``format`` (``skops`` or ``joblib``).
        Raises ``ArtifactUnsafe`` listing the types that skops would have to be told to trust.
        """
        path, artifact_format = (
            _file_given(Path(model), options) if isinstance(model, str | Path) else _write(model, folder, options)
        )
        load_options: dict[str, Json] = {"method": options.get("method") or "predict"}
        if artifact_format == "skops":
            load_options["trusted"] = _trusted_types(path, options.get("trusted") or ())
        return SavedEstimator(path, artifact_format, load_options)

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> SklearnModel:
        """Make an estimator answer batches through the method that was registered."""
        return SklearnModel(model, load_options.get("method", "predict"))

    def load(
        self,
        path: Path,
        format: str,  # noqa: A002
        load_options: Mapping[str, Json],
        *,
        allow_pickle: bool = False,
    ) -> SklearnModel:
        """Read an estimator by the one loader of its format."""
        if format == "skops":
            estimator = _load_skops(path, load_options.get("trusted", ()))
        elif format == "joblib":
            estimator = _load_joblib(path, allow_pickle=allow_pickle)
        else:
            raise LoadFailed(f"scikit-learn has no format {format!r}")
        return self.wrap(estimator, load_options)


class SklearnModel:
    """An estimator behind the batch contract.

    One array input is passed as it is; scalar inputs become a DataFrame where the estimator was fitted on one (or
    holds strings), else a matrix of shape ``(rows, inputs)``.
    """

    def __init__(self, estimator: Any, method: str) -> None:
        call = None if method.startswith("_") else getattr(estimator, method, None)
        if not callable(call):
            raise InvalidInput("method", f"{type(estimator).__name__} has no method {method!r}")
        self._call = call
        self._named = hasattr(estimator, "feature_names_in_")

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch of columns, each of shape ``(rows, ...)``."""
        return _as_columns(self._call(self._assemble(columns)))

    def _assemble(self, columns: Columns) -> Any:
        arrays = list(columns.values())
        if len(arrays) == 1 and not self._named and (arrays[0].ndim > 1 or arrays[0].dtype == object):
            return arrays[0]
        if any(array.ndim > 1 for array in arrays):
            raise InferenceFailed("scikit-learn takes either one array input or scalar inputs only")
        if self._named or any(array.dtype == object for array in arrays):
            return _frame(columns)
        return np.column_stack(arrays)


def _frame(columns: Columns) -> Any:
    pandas = plugins.require("pandas")
    arrays = list(columns.values())
    if all(array.dtype == arrays[0].dtype and array.dtype != object for array in arrays):
        # One block instead of one per column: a tenth of the time for the common all-numeric frame.
        return pandas.DataFrame(np.column_stack(arrays), columns=list(columns))
    return pandas.DataFrame(dict(columns))


def _as_columns(result: Any) -> dict[str, Array]:
    if hasattr(result, "to_numpy"):
        result = result.to_numpy()
    if hasattr(result, "toarray"):
        raise InferenceFailed("the method returned a sparse matrix; wrap it so that it returns a dense one")
    if isinstance(result, Mapping):
        return {str(name): np.asarray(column) for name, column in result.items()}
    if isinstance(result, tuple | list) and result and all(isinstance(part, np.ndarray) for part in result):
        return {f"{SOLE_OUTPUT}_{i}": part for i, part in enumerate(result)}
    return {SOLE_OUTPUT: np.asarray(result)}


# -- the two formats ---------------------------------------------------------------------------------------


def _write(estimator: Any, folder: Path, options: Mapping[str, Json]) -> tuple[Path, str]:
    artifact_format = options.get("format") or "skops"
    path = folder / f"model.{artifact_format}"
    if artifact_format == "skops":
        _dump_skops(estimator, path)
    elif artifact_format == "joblib":
        plugins.require("joblib").dump(estimator, path)
    else:
        raise InvalidInput("format", f"scikit-learn has no format {artifact_format!r}; use 'skops' or 'joblib'")
    return path, artifact_format


def _dump_skops(estimator: Any, path: Path) -> None:
    try:
        plugins.require("skops.io").dump(estimator, path)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        problem = f"skops cannot save this {type(estimator).__name__} ({error}); format='joblib' can, as a pickle"
        raise InvalidInput("model", problem) from error


def _file_given(path: Path, options: Mapping[str, Json]) -> tuple[Path, str]:
    artifact_format = options.get("format") or _FORMAT_OF_SUFFIX.get(path.suffix)
    if artifact_format is None:
        raise InvalidInput("format", f"cannot tell the format of {path.name}; pass format='skops' or format='joblib'")
    return path, artifact_format


def _trusted_types(path: Path, trusted: Sequence[str]) -> list[str]:
    """Return the types to write down as trusted: what the file holds beyond skops's list, if all of it was allowed."""
    _require_zip(path)
    found = set(plugins.require("skops.io").get_untrusted_types(file=path))
    unknown = sorted(found - _PARTS_OF_SKLEARN - set(trusted))
    local = next((name for name in unknown if "<" in name or name.startswith("__main__.")), None)
    if local is not None:
        raise InvalidInput("model", f"{local} cannot be imported where the model is served; define it in a module")
    if unknown:
        raise ArtifactUnsafe(
            f"the model holds types that skops does not trust: {', '.join(unknown)}; "
            f"if you know them to be harmless, register with trusted={unknown!r}"
        )
    return sorted(found)


def _load_skops(path: Path, trusted: Sequence[str]) -> Any:
    skops = plugins.require("skops.io")
    untrusted = plugins.require("skops.io.exceptions").UntrustedTypesFoundException
    _require_zip(path)
    try:
        return skops.load(path, trusted=list(trusted))
    except untrusted as error:
        raise ArtifactUnsafe(f"the artifact holds types that were not trusted at registration: {error}") from error
    except Exception as error:
        raise LoadFailed(f"skops cannot read the artifact: {type(error).__name__}: {error}") from error


def _require_zip(path: Path) -> None:
    """Refuse what is not a zip before any reader sees it, so that a renamed pickle never reaches an unpickler."""
    if not zipfile.is_zipfile(path):
        raise ArtifactUnsafe("the artifact is not a skops file (its bytes are no zip archive); it was not opened")


def _load_joblib(path: Path, *, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise ArtifactUnsafe(
            "the artifact is a pickle (format 'joblib'), which can run any code when it is loaded, so it is refused by "
            "default; if you trust whoever registered it, serve the model with ModelOptions(allow_pickle=True)"
        )
    joblib = plugins.require("joblib")
    try:
        return joblib.load(path)
    except AttributeError as error:
        missing = _LEFT_IN_MAIN.search(str(error))
        if missing is None or missing[2] not in {"__main__", getattr(sys.modules["__main__"].__spec__, "name", None)}:
            raise LoadFailed(f"joblib cannot read the artifact: {error}") from error
        raise LoadFailed(
            f"the artifact needs the class {missing[1]!r} of the script or notebook that registered it; define it in a "
            "module that can be imported where the model is served, and register again"
        ) from error
    except Exception as error:
        raise LoadFailed(f"joblib cannot read the artifact: {type(error).__name__}: {error}") from error
