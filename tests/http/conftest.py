"""Real models behind the HTTP faces: one of an array, one of a frame, one of a tensor, and one with an awkward name.

Each of them has an answer to every request that fits its signature, so that a 500 is always a fault of the server.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, OneHotEncoder
from sklearn.tree import DecisionTreeRegressor

import modelserve as ms
from tests.http.driver import Caller, Subject, asgi_caller, frame_of

AWKWARD = "c++_1.0-b"


@pytest.fixture(scope="session")
def subjects() -> dict[str, Subject]:
    """The models under test by name: how to register each, a good request, and what the bare model answers."""
    rng = np.random.default_rng(20)
    frame, array, tensor = customers(rng, 120), rng.normal(size=(80, 4)).astype("float32"), rng.normal(size=(4, 2, 3))
    churn = churn_pipeline(frame)
    trees = DecisionTreeRegressor(max_depth=5, random_state=0).fit(array, array.sum(axis=1))
    absolute = FunctionTransformer(np.absolute)
    customer = {"tenure": 12, "spend": 39.5, "income": None, "plan": "pro", "autopay": True}
    every = [
        Subject(
            "churn", churn, frame[:8], "predict_proba", customer, lambda row: churn.predict_proba(frame_of(row))[0]
        ),
        Subject("trees", trees, array[:4], "predict", {"x": [0.5, -1.5, 2, 0.25]}, lambda row: _tree(trees, row["x"])),
        Subject(
            "tiles",
            absolute,
            tensor,
            "transform",
            {"x": [[1, -2.5, 3], [-4, 5, -6]]},
            lambda row: np.abs(np.asarray(row["x"], float)),  # of floats: that of the least integer is no integer
        ),
        Subject(AWKWARD, absolute, np.array([1.0, 2.0]), "transform", {"x": -1.5}, lambda row: [abs(row["x"])]),
    ]
    return {subject.model_name: subject for subject in every}


def customers(rng: np.random.Generator, rows: int) -> pd.DataFrame:
    """Return a frame with numbers, missing numbers, strings and booleans."""
    return pd.DataFrame(
        {
            "tenure": rng.integers(0, 72, rows),
            "spend": rng.gamma(2, 30, rows),
            "income": np.where(np.arange(rows) % 5 == 0, np.nan, rng.normal(5e4, 1e4, rows)),
            "plan": rng.choice(["basic", "plus", "pro"], rows),
            "autopay": rng.random(rows) < 0.5,
        }
    )


def churn_pipeline(frame: pd.DataFrame) -> Pipeline:
    """Return a fitted pipeline whose bins have a place for every number and every string."""
    parts = ColumnTransformer(
        [
            ("numbers", bins(), ["tenure", "spend"]),
            ("gaps", make_pipeline(SimpleImputer(), bins()), ["income"]),
            ("plan", OneHotEncoder(handle_unknown="ignore"), ["plan"]),
            ("flag", "passthrough", ["autopay"]),
        ]
    )
    return make_pipeline(parts, LogisticRegression()).fit(frame, (frame["tenure"] < 30) & (frame["plan"] != "pro"))


def bins() -> KBinsDiscretizer:
    """Return bins that warn of nothing."""
    return KBinsDiscretizer(5, encode="ordinal", quantile_method="averaged_inverted_cdf")


def _tree(trees: DecisionTreeRegressor, x: list[float]) -> float:
    return float(trees.predict(np.array([x], "float32"))[0])


@pytest.fixture(scope="session")
def registry(subjects: dict[str, Subject], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ms.Registry]:
    """A registry with every model under test in production."""
    with ms.Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/models.db") as registry:
        for name, subject in subjects.items():
            registry.register(name, "1", subject.model, example=subject.example, method=subject.method)
            registry.promote(name, "1")
        yield registry


@pytest.fixture(scope="session")
def options(subjects: dict[str, Subject]) -> dict[str, ms.ModelOptions]:
    """Options under which no answer is late, however slow the machine."""
    return dict.fromkeys(subjects, ms.ModelOptions(timeout_ms=30_000))


@pytest.fixture(scope="session")
def server(
    registry: ms.Registry, options: dict[str, ms.ModelOptions], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ms.ModelServer]:
    """A started server; its core is what the ASGI face serves."""
    with ms.ModelServer(registry, options, cache_dir=tmp_path_factory.mktemp("cache"), poll_s=3600) as server:
        assert server.ready
        yield server


@pytest.fixture(scope="session")
def call(server: ms.ModelServer) -> Caller:
    """Calls the ASGI face in process."""
    return asgi_caller(server, ms.asgi(server.core))
