"""XGBoost and LightGBM, made known to skl2onnx."""

from __future__ import annotations

import copy
import functools
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import InvalidInput

_ZIPMAP: Final = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
_CLASSIFIERS: Final = {"xgboost": "XGBClassifier", "lightgbm": "LGBMClassifier"}
_REGRESSORS: Final = {"xgboost": "XGBRegressor", "lightgbm": "LGBMRegressor"}


def prepared(estimator: Any) -> Any:
    """Return the estimator as skl2onnx can convert it; any but a booster is returned as it is.

    Raises ``InvalidInput`` for a booster of a kind that is not converted.
    """
    package = type(estimator).__module__.partition(".")[0]
    if package not in _CLASSIFIERS:
        return estimator
    _refuse_what_comes_out_wrong(estimator, package)
    _make_known(package)
    if package == "xgboost" and estimator.get_booster().feature_names is not None:
        estimator = copy.deepcopy(estimator)
        estimator.get_booster().feature_names = None  # the converter knows features by their numbers alone
    return estimator


def _refuse_what_comes_out_wrong(estimator: Any, package: str) -> None:
    """Raise ``InvalidInput`` for kinds of boosters that the converters take without a word, and get wrong."""
    if package == "xgboost" and estimator.get_params().get("booster") not in {None, "gbtree"}:
        raise InvalidInput("optimize", "only boosted trees of XGBoost are converted: booster='gbtree'")
    if package == "lightgbm":
        text = estimator.booster_.model_to_string(num_iteration=1)
        if "\naverage_output\n" in text:
            raise InvalidInput("optimize", "random forests of LightGBM (boosting_type='rf') are not converted")
        if "[zero_as_missing: 1]" in text:
            raise InvalidInput("optimize", "zero_as_missing of LightGBM is not converted")


@functools.cache
def _make_known(package: str) -> None:
    shapes = plugins.require("skl2onnx.common.shape_calculator")
    parts = "onnxmltools.convert"
    if package == "xgboost":
        convert = plugins.require(f"{parts}.xgboost.operator_converters.XGBoost").convert_xgboost
        classifier, regressor = _ZIPMAP, None
    else:
        convert = plugins.require(f"{parts}.lightgbm.operator_converters.LightGbm").convert_lightgbm
        classifier, regressor = _ZIPMAP | {"raw_scores": [True, False]}, {"split": None}
    register = plugins.require("skl2onnx").update_registered_converter
    for names, shape, options in (
        (_CLASSIFIERS, shapes.calculate_linear_classifier_output_shapes, classifier),
        (_REGRESSORS, shapes.calculate_linear_regressor_output_shapes, regressor),
    ):
        cls = getattr(plugins.require(package), names[package])
        register(cls, names[package], shape, convert, options=options)
