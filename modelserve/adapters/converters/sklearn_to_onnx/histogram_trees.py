"""HistGradientBoosting as ONNX: the thresholds are the very doubles that scikit-learn compares with."""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.converters.sklearn_to_onnx.assembly import Stage
from modelserve.errors import InvalidInput
from modelserve.types import Array

_OPSETS: Final = {"": 21, "ai.onnx.ml": 3}
_ESTIMATORS: Final = ("HistGradientBoostingClassifier", "HistGradientBoostingRegressor")
_INVERSE_LINKS: Final = {"IdentityLink": "Identity", "LogLink": "Exp"}
_METHODS: Final = {True: ("predict", "predict_proba", "decision_function"), False: ("predict",)}


def is_one(estimator: Any) -> bool:
    """Whether it is such an estimator."""
    return type(estimator).__name__ in _ESTIMATORS


def stage(estimator: Any, method: str) -> Stage:
    """Return the estimator as a graph from one matrix to the answers of ``method``.

    Raises ``InvalidInput`` for categorical features, and for a method or a loss that has no form here.
    """
    if estimator.is_categorical_ is not None:
        raise InvalidInput("optimize", "categorical features of HistGradientBoosting are not converted; encode them")
    classifies = hasattr(estimator, "classes_")
    if method not in _METHODS[classifies]:
        raise InvalidInput("method", f"{type(estimator).__name__} has no {method!r}")
    steps = _labelled(estimator, method) if classifies else _regressed(estimator)
    return Stage(_model(estimator, steps), 0)


Step = tuple[str, list[str], dict[str, Any]]
"""An operator, its inputs and its attributes. Its output is called by its place: ``step0``, ``step1``, …"""


def _regressed(estimator: Any) -> list[Step]:
    link = type(estimator._loss.link).__name__  # noqa: SLF001  # the one place where it is kept
    if link not in _INVERSE_LINKS:
        raise InvalidInput("optimize", f"the link {link} of the regressor's loss is not converted")
    return [(_INVERSE_LINKS[link], ["raw"], {})]


def _labelled(estimator: Any, method: str) -> list[Step]:
    several = estimator.n_trees_per_iteration_ > 1
    if method == "decision_function":
        return [("Identity", ["raw"], {})]
    steps: list[Step] = (
        [("Softmax", ["raw"], {"axis": 1})]
        if several
        else [
            ("Sigmoid", ["raw"], {}),
            ("Sub", ["one", "step0"], {}),
            ("Concat", ["step1", "step0"], {"axis": 1}),
        ]
    )
    if method == "predict":
        steps.append(("ArgMax", [f"step{len(steps) - 1}"], {"axis": 1, "keepdims": 0}))
        steps.append(("Gather", ["labels", f"step{len(steps) - 1}"], {}))
    return steps


def _model(estimator: Any, steps: list[Step]) -> Any:
    helper, double = plugins.require("onnx.helper"), plugins.require("onnx").TensorProto.DOUBLE
    trees = _trees(estimator)
    nodes = [
        helper.make_node("TreeEnsembleRegressor", ["x"], ["sums"], domain="ai.onnx.ml", **trees),
        helper.make_node("Cast", ["sums"], ["raw"], to=double),
        *(helper.make_node(name, inputs, [f"step{i}"], **more) for i, (name, inputs, more) in enumerate(steps)),
    ]
    labels = _labels(estimator)
    kind = helper.np_dtype_to_tensor_dtype(labels.dtype) if steps[-1][0] == "Gather" else double
    takes = helper.make_tensor_value_info("x", double, [None, estimator.n_features_in_])
    gives = helper.make_tensor_value_info(f"step{len(steps) - 1}", kind, None)
    from_array = plugins.require("onnx.numpy_helper").from_array
    constants = [from_array(np.array(1.0), "one"), from_array(labels, "labels")]
    graph = helper.make_graph(nodes, "trees", [takes], [gives], constants)
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets)


def _labels(estimator: Any) -> Array:
    labels = np.asarray(getattr(estimator, "classes_", [0]))
    if labels.dtype.kind in "OU":
        return labels.astype(object)
    return labels.astype("int64")


def _trees(estimator: Any) -> dict[str, Any]:
    """Return the attributes of the operator: one entry per node of every tree, and one per leaf."""
    predictors = [(tree.nodes, k) for trees in estimator._predictors for k, tree in enumerate(trees)]  # noqa: SLF001
    sizes = [len(nodes) for nodes, _ in predictors]
    nodes = np.concatenate([nodes for nodes, _ in predictors])
    leaf = nodes["is_leaf"].astype(bool)
    tree = np.repeat(np.arange(len(sizes)), sizes)
    place = np.fromiter(itertools.chain.from_iterable(map(range, sizes)), "int64")
    target = np.repeat([k for _, k in predictors], sizes)
    from_array = plugins.require("onnx.numpy_helper").from_array
    return {
        "nodes_treeids": tree.tolist(),
        "nodes_nodeids": place.tolist(),
        "nodes_featureids": np.where(leaf, 0, nodes["feature_idx"]).tolist(),
        "nodes_modes": np.where(leaf, "LEAF", "BRANCH_LEQ").tolist(),
        "nodes_values_as_tensor": from_array(np.where(leaf, 0.0, nodes["num_threshold"]), "thresholds"),
        "nodes_truenodeids": np.where(leaf, 0, nodes["left"]).tolist(),
        "nodes_falsenodeids": np.where(leaf, 0, nodes["right"]).tolist(),
        "nodes_missing_value_tracks_true": np.where(leaf, 0, nodes["missing_go_to_left"]).tolist(),
        "target_treeids": tree[leaf].tolist(),
        "target_nodeids": place[leaf].tolist(),
        "target_ids": target[leaf].tolist(),
        "target_weights_as_tensor": from_array(nodes["value"][leaf], "leaves"),
        "n_targets": estimator.n_trees_per_iteration_,
        "base_values_as_tensor": from_array(np.ravel(estimator._baseline_prediction), "base"),  # noqa: SLF001
    }
