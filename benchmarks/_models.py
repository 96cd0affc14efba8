"""The models that the execution engine is measured with, and their rows. Workers import this module."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning


class Sleeper(BaseEstimator):  # type: ignore[misc]  # published without types
    """Takes 5 ms and 0.2 ms a row, asleep: the capacity is known, and the cores are left to the load."""

    def predict(self, rows: Any) -> Any:
        time.sleep(0.005 + 0.0002 * len(rows))
        return rows[:, 0]


class Choosy(BaseEstimator):  # type: ignore[misc]  # as above
    """Takes its time asleep, and then raises on a batch with a row below 0, as a model does on an unknown category."""

    def __init__(self, fixed: float = 0.0, per_row: float = 0.0) -> None:
        self.fixed = fixed
        self.per_row = per_row

    def predict(self, rows: Any) -> Any:
        time.sleep(self.fixed + self.per_row * len(rows))
        if (rows[:, 0] < 0).any():
            raise ValueError(f"unknown category {rows[:, 0].min()}")
        return rows[:, 0]


class Pictures(BaseEstimator):  # type: ignore[misc]  # published without types
    """A small network on pictures of shape (3, 224, 224): patches of 16 × 16 through two dense layers, pooled."""

    def __init__(self) -> None:
        chance = np.random.default_rng(0)
        self.patches = chance.standard_normal((768, 256), dtype=np.float32) / 28
        self.mix = chance.standard_normal((256, 256), dtype=np.float32) / 16
        self.head = chance.standard_normal((256, 10), dtype=np.float32) / 16

    def predict(self, pictures: Any) -> Any:
        count = len(pictures)
        patches = pictures.reshape(count, 3, 14, 16, 14, 16).transpose(0, 2, 4, 1, 3, 5).reshape(count * 196, 768)
        hidden = np.maximum(np.maximum(patches @ self.patches, 0) @ self.mix, 0)
        return hidden.reshape(count, 196, 256).mean(axis=1) @ self.head


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its rows (along axis 0), how many callers ask at once, and how many rows a batch has at most."""

    name: str
    model: Any
    rows: Any
    callers: int = 128
    largest: int = 64
    pickled: bool = False


def forest() -> Subject:
    """Fit a random forest of 200 trees on 30 features."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  # not every program needs it
    from sklearn.ensemble import RandomForestClassifier  # noqa: PLC0415

    x, y = load_breast_cancer(return_X_y=True)
    return Subject("forest of 200", RandomForestClassifier(200, random_state=0).fit(x, y), x)


def mlp() -> Subject:
    """Fit a perceptron of 256-1024-1024-10, once over: the weights need not be good to be multiplied."""
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

    chance = np.random.default_rng(0)
    x = chance.standard_normal((400, 256)).astype(np.float32)
    y = np.arange(400) % 10
    model = MLPClassifier((1024, 1024), max_iter=2, random_state=0)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        return Subject("MLP 256-1024-1024-10", model.fit(x, y), x)


def pictures() -> Subject:
    """Make the network on pictures, and 32 of them."""
    x = np.random.default_rng(1).standard_normal((32, 3, 224, 224), dtype=np.float32)
    return Subject("pictures 3×224×224", Pictures(), x, callers=32, largest=16, pickled=True)


def first_element(x: Any) -> Any:
    """Answer a row with one of its numbers: what is measured is the way in."""
    return np.asarray(x, float).reshape(len(x), -1)[:, :1]


def length_of(x: Any) -> Any:
    """Answer a row with the length of its string."""
    return np.array([[float(len(each))] for each in np.asarray(x).reshape(len(x), -1)[:, 0]])
