"""The format ``skops``: a zip of JSON and arrays, without a pickle.

Types outside skops's own allow-list are loaded only when they are on the list of trusted types that was written down
at registration.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn.formats import Format
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed, describe
from modelserve.types import Json, Runtime

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
        "sklearn.gaussian_process.kernels.DotProduct",
        "sklearn.gaussian_process.kernels.ExpSineSquared",
        "sklearn.gaussian_process.kernels.Exponentiation",
        "sklearn.gaussian_process.kernels.Matern",
        "sklearn.gaussian_process.kernels.Product",
        "sklearn.gaussian_process.kernels.RBF",
        "sklearn.gaussian_process.kernels.RationalQuadratic",
        "sklearn.gaussian_process.kernels.Sum",
        "sklearn.gaussian_process.kernels.WhiteKernel",
        "sklearn.metrics._dist_metrics.ChebyshevDistance64",
        "sklearn.metrics._dist_metrics.EuclideanDistance64",
        "sklearn.metrics._dist_metrics.ManhattanDistance64",
        "sklearn.metrics._dist_metrics.MinkowskiDistance64",
        "sklearn.metrics._scorer._PassthroughScorer",
        "sklearn.model_selection._split.KFold",
        "sklearn.model_selection._split.StratifiedKFold",
        "sklearn.neighbors._ball_tree.BallTree",
        "sklearn.neighbors._kd_tree.KDTree",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
        "sklearn.utils._bunch.Bunch",
    }
)

# skops imports every package of scikit-learn to list its estimators. These would bring whole frameworks with them: two
# seconds and 200 MB of every worker for PyTorch, where it is installed.
_SHIMS: Final = tuple(f"sklearn.externals.array_api_compat.{name}" for name in ("cupy", "dask", "torch"))


class SkopsZip(Format):
    """Estimators in the format of skops, the default."""

    name = "skops"
    suffixes = (".skops",)

    def write(self, estimator: Any, path: Path) -> dict[str, Json]:
        """Write an estimator."""
        _dump_skops(estimator, path)
        return {}

    def inspect(self, path: Path, options: Mapping[str, Json]) -> dict[str, Json]:
        """List the types that have to be trusted; raises ``ArtifactUnsafe`` unless all of them were allowed."""
        return {"trusted": _trusted_types(path, options.get("trusted") or ())}

    def read(self, data: bytes, load_options: Mapping[str, Json], runtime: Runtime) -> Any:  # noqa: ARG002
        """Read an estimator made of known and trusted types."""
        return _load_skops(data, load_options.get("trusted", ()))


def _dump_skops(estimator: Any, path: Path) -> None:
    try:
        _skops().dump(estimator, path)
    except Exception as error:  # whatever the parts of an estimator, which may be anybody's, raise
        problem = f"skops cannot save this {type(estimator).__name__} ({error}); format='joblib' can, as a pickle"
        raise InvalidInput("model", problem) from error


def _trusted_types(path: Path, trusted: Sequence[str]) -> list[str]:
    """Return the types to write down as trusted: what the file holds beyond skops's list, if all of it was allowed."""
    _require_zip(path.read_bytes())
    try:
        found = set(_skops().get_untrusted_types(file=path))
    except Exception as error:  # whatever a file that is cut off, damaged or made up by somebody does to skops
        raise LoadFailed(f"skops cannot read the artifact: {describe(error)}") from error
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


def _load_skops(data: bytes, trusted: Sequence[str]) -> Any:
    skops = _skops()
    untrusted = plugins.require("skops.io.exceptions").UntrustedTypesFoundException
    _require_zip(data)
    try:
        return skops.loads(data, trusted=list(trusted))
    except untrusted as error:
        raise ArtifactUnsafe(f"the artifact holds types that were not trusted at registration: {error}") from error
    except Exception as error:
        raise LoadFailed(f"skops cannot read the artifact: {type(error).__name__}: {error}") from error


def _require_zip(data: bytes) -> None:
    """Refuse what is not a zip before any reader sees it, so that a renamed pickle never reaches an unpickler."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ArtifactUnsafe("the artifact is not a skops file (its bytes are no zip archive); it was not opened")


def _skops() -> Any:
    return plugins.require("skops.io", hiding=_SHIMS)
