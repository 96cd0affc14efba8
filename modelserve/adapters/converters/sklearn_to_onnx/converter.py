"""scikit-learn to ONNX, by skl2onnx; XGBoost and LightGBM by onnxmltools' parts for it.

There are two ways. The first computes in the precision that the estimators themselves compute in: double, except for
the trees that round their inputs to float32. The second computes everything in float32, for operators that ONNX Runtime
has in no other precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.converters.sklearn_to_onnx import assembly, boosters, gaps, histogram_trees
from modelserve.adapters.converters.sklearn_to_onnx.assembly import Stage
from modelserve.adapters.fitted_columns import fitted_names, in_fitted_order
from modelserve.errors import InvalidInput, MissingDependency, describe
from modelserve.ports import SavedModel
from modelserve.types import SOLE_OUTPUT, Array, Columns, FrameworkName, Json

_WAYS: Final = {"double": "float64", "float": "float32"}
_PLACES: Final = {"predict": 0, "predict_proba": 1, "decision_function": 1, "transform": -1}
"""Which of its outputs a converted estimator gives for a method."""
_SINGLE: Final = ("sklearn.tree.", "sklearn.ensemble._forest", "sklearn.ensemble._gb", "xgboost.", "lightgbm.")
"""Estimators that round their inputs to float32 (LightGBM does not, but is converted in float32 alone)."""
_OPSETS: Final = {"": 21, "ai.onnx.ml": 3}
_TYPES: Final = {"float64": "DoubleTensorType", "float32": "FloatTensorType", "object": "StringTensorType"}


class SklearnToOnnx:
    """The conversion of fitted estimators and pipelines to ONNX; see :class:`modelserve.ports.Converter`."""

    framework: FrameworkName = "onnx"

    def convert(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns) -> Iterator[SavedModel]:
        """Write ``double.onnx``, then ``float.onnx``, as far as the model has such a form.

        The graph takes the inputs and gives the answers of the estimator in the same types and shapes. Raises
        ``InvalidInput`` for a method that is not converted, and when there is no way at all.
        """
        method = options.get("method") or "predict"
        wanted = _wanted(model, {**options, "method": method}, example)
        if (fitted := fitted_names(model)) is not None:
            example = {name: example[name] for name in in_fitted_order(fitted, list(example))}
        steps = _steps(model)
        _check_labels(steps[-1])
        problems: list[str] = []
        for way, precision in _WAYS.items():
            try:
                graph = _graph(steps, method, example, wanted, precision)
            except MissingDependency:
                raise
            except Exception as error:  # noqa: BLE001  # skl2onnx raises anything for what it does not know
                problems.append(f"{way}: {describe(error).splitlines()[0]}")
                continue
            path = folder / f"{way}.onnx"
            path.write_bytes(graph.SerializeToString())
            yield SavedModel(path, "onnx", {})
        if len(problems) == len(_WAYS):
            raise InvalidInput("optimize", f"{type(steps[-1]).__name__} cannot be converted: {'; '.join(problems)}")


def _wanted(model: Any, options: Mapping[str, Json], example: Columns) -> Array:
    """Return what the model itself answers to the example: the form that the graph has to give."""
    method = options["method"]
    if method not in _PLACES:
        raise InvalidInput("method", f"{method!r} is not converted, only {', '.join(_PLACES)}; leave out optimize=")
    try:
        answer = plugins.framework("sklearn").wrap(model, options).infer(example)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput("example", f"the model does not answer it: {describe(error)}") from error
    if set(answer) != {SOLE_OUTPUT}:
        raise InvalidInput(
            "method", f"{method!r} gives several outputs, which cannot be converted; leave out optimize="
        )
    return answer[SOLE_OUTPUT]


def _steps(model: Any) -> list[Any]:
    """Return the fitted estimators of a pipeline, in order; of a search, the best one."""
    model = getattr(model, "best_estimator_", model)
    if not hasattr(model, "steps"):
        return [model]
    return [part for _, step in model.steps if hasattr(step, "fit") for part in _steps(step)]


def _check_labels(last: Any) -> None:
    labels = getattr(last, "classes_", [])
    for each in map(np.asarray, labels if isinstance(labels, list) else [labels]):
        if each.dtype.kind == "f" and np.any(each != np.trunc(each)):
            raise InvalidInput(
                "optimize", "labels that are fractions cannot be converted; use whole numbers or strings"
            )


# -- the stages of a graph ---------------------------------------------------------------------------------


def _graph(steps: list[Any], method: str, example: Columns, wanted: Array, precision: str) -> Any:
    *before, last = steps
    stages: list[Stage] = []
    rows = example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is whether the answers are the same, and that is looked at
        if before:
            pipeline = plugins.require("sklearn.pipeline").make_pipeline(*before)
            stages.append(Stage(_converted(pipeline, _types(pipeline, rows, precision), {}), _PLACES["transform"]))
            rows = {SOLE_OUTPUT: np.empty((1, last.n_features_in_), precision)}
        stages.append(_last_stage(last, method, rows, precision))
    return assembly.assemble(stages, example, wanted, method)


def _last_stage(last: Any, method: str, rows: Columns, precision: str) -> Stage:
    if histogram_trees.is_one(last):
        return histogram_trees.stage(last, method)
    if f"{type(last).__module__}.".startswith(_SINGLE):
        precision = "float32"
    types = _types(last, rows, precision)
    model = _converted(boosters.prepared(last), types, _options(last, method))
    return Stage(gaps.with_gaps(model, last), _PLACES[method])


def _converted(estimator: Any, types: list[Any], options: Mapping[str, Json]) -> Any:
    convert = plugins.require("skl2onnx").convert_sklearn
    try:
        return convert(estimator, initial_types=types, options={id(estimator): dict(options)}, target_opset=_OPSETS)
    except NameError:  # how skl2onnx says that the estimator has no such option
        if not options.get("zipmap", True):
            return _converted(estimator, types, {name: value for name, value in options.items() if name != "zipmap"})
        raise


def _options(last: Any, method: str) -> dict[str, Json]:
    """Ask for arrays in place of maps, and for scores in place of probabilities where the method gives them."""
    if not hasattr(last, "classes_"):
        return {}
    return {"zipmap": False} | ({"raw_scores": True} if method == "decision_function" else {})


def _types(first: Any, columns: Columns, precision: str) -> list[Any]:
    """Return the inputs of a stage: one for each column where they are told apart by name, else one matrix."""
    kinds = {name: "object" if column.dtype == object else precision for name, column in columns.items()}
    widths = {name: column.shape[1] if column.ndim > 1 else 1 for name, column in columns.items()}
    if "object" not in kinds.values() and not _tells_columns_apart(first):
        kinds, widths = {SOLE_OUTPUT: precision}, {SOLE_OUTPUT: sum(widths.values())}
    types = plugins.require("skl2onnx.common.data_types")
    return [(name, getattr(types, _TYPES[kind])([None, widths[name]])) for name, kind in kinds.items()]


def _tells_columns_apart(first: Any) -> bool:
    while hasattr(first, "steps"):
        first = first.steps[0][1]
    return hasattr(first, "transformers_")
