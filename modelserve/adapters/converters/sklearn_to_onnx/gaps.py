"""Missing values in the trees of scikit-learn, which skl2onnx would all send to the same side."""

from __future__ import annotations

from typing import Any, Final

from modelserve import plugins

_OPERATORS: Final = ("TreeEnsembleClassifier", "TreeEnsembleRegressor")
_ATTRIBUTE: Final = "nodes_missing_value_tracks_true"


def with_gaps(model: Any, estimator: Any) -> Any:
    """Return a converted tree or forest whose nodes send missing values where the estimator sends them."""
    trees = [each.tree_ for each in getattr(estimator, "estimators_", [estimator]) if hasattr(each, "tree_")]
    ensembles = [node for node in model.graph.node if node.op_type in _OPERATORS]
    if not trees or len(ensembles) != 1:
        return model
    (node,) = ensembles
    attributes = {each.name: each for each in node.attribute}
    places = zip(attributes["nodes_treeids"].ints, attributes["nodes_nodeids"].ints, strict=True)
    leads_left = [int(trees[tree].missing_go_to_left[place]) for tree, place in places]
    kept = [each for each in node.attribute if each.name != _ATTRIBUTE]
    del node.attribute[:]
    node.attribute.extend([*kept, plugins.require("onnx.helper").make_attribute(_ATTRIBUTE, leads_left)])
    return model
