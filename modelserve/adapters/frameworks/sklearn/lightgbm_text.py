"""The format ``lightgbm-text``: LightGBM's own text of a booster. Data alone, read by LightGBM's parser.

The text holds the trees but not the labels of a classifier; those are written down beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn.formats import Format
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.types import Array, Json, Runtime

_CLASSIFYING: Final = ("binary", "multiclass", "multiclassova")


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
        """Number the classes of a classifier, for want of their labels."""
        header = _header(_text(path))
        objective = header.get("objective", "").partition(" ")[0]
        classes = max(2, int(header.get("num_class", "1")))
        return {"labels": list(range(classes)) if objective in _CLASSIFYING else None}

    def read(self, path: Path, load_options: Mapping[str, Json], runtime: Runtime) -> Any:
        """Read a booster, and stand in for the estimator that it was part of."""
        lightgbm = plugins.require("lightgbm")
        try:
            booster = lightgbm.Booster(model_str=_text(path))
        except lightgbm.basic.LightGBMError as error:
            raise LoadFailed(f"LightGBM cannot read the artifact: {error}") from error
        labels = load_options.get("labels")
        return Regressor(booster, runtime.threads) if labels is None else Classifier(booster, runtime.threads, labels)


@dataclasses.dataclass(frozen=True)
class Regressor:
    """A booster that answers as the estimator did which it was saved from."""

    booster: Any
    threads: int | None

    def predict(self, rows: Any) -> Array:
        """Return one value per row."""
        return np.asarray(self.booster.predict(rows, num_threads=self.threads or 0))


class Classifier:
    """A booster and the labels of its classes, which together answer as the estimator did."""

    def __init__(self, booster: Any, threads: int | None, labels: list[Json]) -> None:
        self._scores = Regressor(booster, threads)
        self._labels = np.array(labels, dtype=object if isinstance(labels[0], str) else None)

    def predict_proba(self, rows: Any) -> Array:
        """Return the probability of each class, in the order of the labels."""
        scores = self._scores.predict(rows)
        return scores if scores.ndim > 1 else np.column_stack([1.0 - scores, scores])

    def predict(self, rows: Any) -> Array:
        """Return the label of the likeliest class."""
        labels: Array = self._labels[self.predict_proba(rows).argmax(axis=1)]
        return labels


def _text(path: Path) -> str:
    """Return the text of a booster that is whole: LightGBM's parser crashes on one that was cut short."""
    data = path.read_bytes()
    if not data.startswith(b"tree\n"):
        raise ArtifactUnsafe("the artifact is not LightGBM's text (it does not begin with 'tree'); it was not opened")
    try:
        text = data.decode()
        sizes = [int(size) for size in _header(text)["tree_sizes"].split()]
    except (ValueError, KeyError) as error:
        raise LoadFailed(f"LightGBM cannot read the artifact: {error!r}") from error
    if not _is_whole(text.partition("\n\n")[2], sizes):
        raise LoadFailed("LightGBM cannot read the artifact: it was cut short")
    return text


def _is_whole(trees: str, sizes: list[int]) -> bool:
    starts = list(itertools.accumulate(sizes, initial=0))
    end = starts.pop()
    return (
        all(trees.startswith(f"Tree={i}\n", start) for i, start in enumerate(starts))
        and trees.startswith("end of trees\n", end)
        and trees.count("\nparameters:\n", end) == trees.count("\nend of parameters\n", end)
    )


def _header(text: str) -> dict[str, str]:
    lines = text.partition("\n\n")[0].splitlines()
    return dict(line.partition("=")[::2] for line in lines)
