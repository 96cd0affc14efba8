"""The format ``xgboost-json``: XGBoost's own JSON of an estimator. Data alone, read by XGBoost's parser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn.formats import CATEGORIES, Format
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.types import Json, Runtime

_ESTIMATORS: Final = ("XGBClassifier", "XGBRegressor", "XGBRanker", "XGBRFClassifier", "XGBRFRegressor")
_CLASSIFYING: Final = ("binary:", "multi:")


class XGBoostJson(Format):
    """Estimators of XGBoost's scikit-learn interface. The file says which inputs they were fitted on."""

    name = "xgboost-json"
    suffixes = (".json",)

    def write(self, estimator: Any, path: Path) -> dict[str, Json]:
        """Write a fitted estimator."""
        name = type(estimator).__name__
        if name not in _ESTIMATORS:
            problem = f"XGBoost's JSON holds no {name}; it holds {', '.join(_ESTIMATORS)}"
            raise InvalidInput("model", problem)
        try:
            estimator.save_model(path)
        except Exception as error:
            raise InvalidInput("model", f"XGBoost cannot save it: {error}") from error
        missing = float(estimator.missing)
        return {"estimator": name, "missing": None if math.isnan(missing) else missing}

    def inspect(self, path: Path, options: Mapping[str, Json]) -> dict[str, Json]:  # noqa: ARG002
        """Tell a classifier from a regressor: by what it says, or by what it was trained for."""
        try:
            learner = orjson.loads(_require_json(path.read_bytes()))["learner"]
            kind = orjson.loads(learner["attributes"].get("scikit_learn", "{}")).get("_estimator_type")
            objective = learner["objective"]["name"]
            by_category = _goes_by_categories(learner)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise LoadFailed(f"XGBoost cannot read the artifact: {error}") from error
        if by_category:
            raise InvalidInput("model", CATEGORIES)
        classifies = kind == "classifier" if kind else objective.startswith(_CLASSIFYING)
        return {"estimator": "XGBClassifier" if classifies else "XGBRegressor"}

    def read(self, data: bytes, load_options: Mapping[str, Json], runtime: Runtime) -> Any:
        """Read an estimator; of its classes nothing is loaded but what XGBoost has itself."""
        name = load_options.get("estimator")
        if name not in _ESTIMATORS:
            raise LoadFailed(f"XGBoost has no estimator {name!r}")
        _require_json(data)
        missing = load_options.get("missing")  # the file does not say which number stands for none
        options = {} if missing is None else {"missing": missing}
        estimator = getattr(plugins.require("xgboost"), name)(n_jobs=runtime.threads, **options)
        try:
            estimator.load_model(bytearray(data))
        except Exception as error:
            reason = str(error).partition("\nStack trace")[0]
            raise LoadFailed(f"XGBoost cannot read the artifact: {reason}") from error
        return estimator


def _goes_by_categories(learner: Json) -> bool:
    """Whether it was fitted on categories of a frame. Numbers that were declared to be categories stand for themselves.

    XGBoost writes the categories down since 3.1; before that nothing but the names of the columns tells the two apart.
    """
    if "c" not in learner.get("feature_types", ()):
        return False
    known = learner["gradient_booster"].get("model", {}).get("cats")
    if known is None:
        return bool(learner.get("feature_names"))
    return any(each.get("values") for each in known["enc"])


def _require_json(data: bytes) -> bytes:
    """Return the bytes of what begins as XGBoost's JSON does, or its binary form."""
    if not data.startswith(b"{"):
        raise ArtifactUnsafe("the artifact is not XGBoost's JSON (its bytes begin with no brace); it was not opened")
    return data
