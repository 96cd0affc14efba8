"""The format ``lightgbm-text``: LightGBM's own text of a booster. Data alone, read by LightGBM's parser.

The text holds the trees but not the labels of a classifier; those are written down beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn.formats import CATEGORIES, Format
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.types import Array, Json, Runtime

_CLASSIFYING: Final = ("binary", "multiclass", "multiclassova")
_NEEDED: Final = ("leaf_value", "left_child", "right_child", "split_feature", "threshold", "decision_type")
_OF_LEAVES: Final = ("leaf_value", "leaf_weight", "leaf_count")
_OF_BRANCHES: Final = (*_NEEDED[1:], "split_gain", "internal_value", "internal_weight", "internal_count")
_OF_AN_ARRAY: Final = re.compile(r"Column_\d+")
_CATEGORIES: Final = re.compile(r"^pandas_categorical:(.*)$", re.MULTILINE)
_CATEGORICAL: Final = 1  # the bit of a decision type that says so


class LightGBMText(Format):
    """Estimators of LightGBM's scikit-learn interface."""

    name = "lightgbm-text"
    suffixes = (".txt",)

    def write(self, estimator: Any, path: Path) -> dict[str, Json]:
        """Write a fitted estimator."""
        try:
            estimator.booster_.save_model(path)
        except Exception as error:
            raise InvalidInput("model", f"LightGBM cannot save it: {error}") from error
        labels = getattr(estimator, "classes_", None)
        return {"labels": None if labels is None else labels.tolist()}

    def inspect(self, path: Path, options: Mapping[str, Json]) -> dict[str, Json]:  # noqa: ARG002
        """Number the classes of a classifier, for want of their labels; note the names of the columns."""
        text = _text(path.read_bytes())
        if _goes_by_categories(text):
            raise InvalidInput("model", CATEGORIES)
        header = _header(text)
        objective = header.get("objective", "").partition(" ")[0]
        labels = list(range(max(2, int(header["num_class"])))) if objective in _CLASSIFYING else None
        names = header.get("feature_names", "").split()
        return {"labels": labels} | ({"names": names} if not all(map(_OF_AN_ARRAY.fullmatch, names)) else {})

    def read(self, data: bytes, load_options: Mapping[str, Json], runtime: Runtime) -> Any:
        """Read a booster, and stand in for the estimator that it was part of."""
        lightgbm = plugins.require("lightgbm")
        try:
            booster = lightgbm.Booster(model_str=_text(data))
        except lightgbm.basic.LightGBMError as error:
            raise LoadFailed(f"LightGBM cannot read the artifact: {error}") from error
        labels = load_options.get("labels")
        regressor = Regressor(booster, runtime.threads, load_options.get("names"))
        return regressor if labels is None else Classifier(regressor, labels)


@dataclasses.dataclass(frozen=True)
class Regressor:
    """A booster that answers as the estimator did which it was saved from."""

    booster: Any
    threads: int | None
    column_order: Sequence[str] | None = None

    def predict(self, rows: Any) -> Array:
        """Return one value per row."""
        return np.asarray(self.booster.predict(rows, num_threads=self.threads or 0))


class Classifier:
    """A booster and the labels of its classes, which together answer as the estimator did."""

    def __init__(self, scores: Regressor, labels: list[Json]) -> None:
        self._scores = scores
        self.column_order = scores.column_order
        self._labels = np.array(labels, dtype=object if isinstance(labels[0], str) else None)

    def predict_proba(self, rows: Any) -> Array:
        """Return the probability of each class, in the order of the labels."""
        scores = self._scores.predict(rows)
        return scores if scores.ndim > 1 else np.column_stack([1.0 - scores, scores])

    def predict(self, rows: Any) -> Array:
        """Return the label of the likeliest class."""
        labels: Array = self._labels[self.predict_proba(rows).argmax(axis=1)]
        return labels


def _text(data: bytes) -> str:
    """Return the text of a booster that is whole: LightGBM's parser, and its trees, crash on one that is not."""
    if not data.startswith(b"tree\n"):
        raise ArtifactUnsafe("the artifact is not LightGBM's text (it does not begin with 'tree'); it was not opened")
    try:
        text = data.decode()
        _check(text)
    except (ValueError, LookupError) as error:
        raise LoadFailed(f"LightGBM cannot read the artifact: {type(error).__name__}: {error}") from error
    return text


def _check(text: str) -> None:
    """Raise ``ValueError`` or ``LookupError`` unless all that the header speaks of is there, and hangs together."""
    header, trees = _header(text), text.partition("\n\n")[2]
    ends = list(itertools.accumulate(map(int, header["tree_sizes"].split())))
    end = ends[-1] if ends else 0
    if not trees.startswith("end of trees\n", end):
        raise ValueError("it was cut short")
    if trees.count("\nparameters:\n", end) != trees.count("\nend of parameters\n", end):
        raise ValueError("its parameters were cut short")
    if not 1 <= int(header["num_class"]) <= max(1, len(ends)):
        raise ValueError(f"it has {len(ends)} trees for {header['num_class']} classes")
    for i, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
        lines = trees[start:stop].splitlines()
        if lines[:1] != [f"Tree={i}"]:
            raise ValueError(f"tree {i} is not where the header says")
        _check_tree(_fields(lines), features=int(header["max_feature_idx"]) + 1)


def _check_tree(tree: dict[str, str], *, features: int) -> None:
    """Raise unless every branch of a tree leads on to a later one, or to a leaf that it has."""
    leaves = int(tree["num_leaves"])
    if tree.get("is_linear", "0") != "0":
        raise ValueError("linear trees cannot be checked before they are loaded; use format='joblib'")
    for names, wanted in ((_OF_LEAVES, leaves), (_OF_BRANCHES, leaves - 1)):
        for name in names:
            if len(tree.get(name, "").split()) not in ({wanted} if name in _NEEDED else {0, wanted}):
                raise ValueError(f"a tree of {leaves} leaves has another number of {name}")
    for side in ("left_child", "right_child"):
        children = enumerate(map(int, tree.get(side, "").split()))
        if not all(i < child < leaves - 1 or -leaves <= child < 0 for i, child in children):
            raise ValueError(f"a {side} leads nowhere")
    if not all(0 <= int(column) < features for column in tree.get("split_feature", "").split()):
        raise ValueError("a tree asks for a column that there is not")
    kinds = zip(tree.get("threshold", "").split(), tree.get("decision_type", "").split(), strict=True)
    _check_categories(tree, [int(float(threshold)) for threshold, kind in kinds if int(kind) & _CATEGORICAL])


def _check_categories(tree: dict[str, str], used: list[int]) -> None:
    count = int(tree.get("num_cat", "0"))
    bounds = [int(bound) for bound in tree.get("cat_boundaries", "0").split()]
    words = len(tree.get("cat_threshold", "").split())
    if len(bounds) != count + 1 or bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != words:
        raise ValueError("the categories of a tree do not hang together")
    if not all(0 <= at < count for at in used):
        raise ValueError("a tree asks for categories that there are not")


def _goes_by_categories(text: str) -> bool:
    known = _CATEGORIES.search(text)
    return known is not None and known[1].strip() not in {"null", "[]"}


def _header(text: str) -> dict[str, str]:
    return _fields(text.partition("\n\n")[0].splitlines())


def _fields(lines: list[str]) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in lines)
