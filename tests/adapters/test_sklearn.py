"""The scikit-learn adapter: the contract on real models, and what is its own."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.base import clone
from sklearn.cluster import Birch, KMeans
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

import modelserve as ms
from modelserve.adapters.frameworks.sklearn import SklearnFramework
from modelserve.errors import ArtifactUnsafe, InferenceFailed, InvalidInput, LoadFailed
from modelserve.ports import Framework
from modelserve.testing.frameworks import Case, FrameworkContract
from modelserve.types import SOLE_OUTPUT

CANCER, MALIGNANT = load_breast_cancer(return_X_y=True)
DIABETES, PROGRESS = load_diabetes(return_X_y=True)
IRIS = load_iris(as_frame=True)
SPECIES = IRIS.target_names[IRIS.target]


def _mixed_frame() -> pd.DataFrame:
    """Numbers, text, booleans and missing values, as a table comes from a database."""
    numbers = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "plan": numbers.choice(["free", "pro", "ünïcode"], 200),
            "tenure": numbers.integers(0, 60, 200),
            "active": numbers.random(200) > 0.5,
            "spend": np.where(numbers.random(200) > 0.2, numbers.normal(50, 20, 200), np.nan),
        }
    )


MIXED = _mixed_frame()
CHURNED = (MIXED["tenure"] < 20) & ~MIXED["active"]
WORDS = np.array([f"{a} {b}" for a in ("good", "bad", "fine", "poor") for b in ("food", "staff", "room", "view")] * 5)


def _predict(model: Any, rows: Any) -> Any:
    return model.predict(rows)


def _probabilities(model: Any, rows: Any) -> Any:
    return model.predict_proba(rows)


def _transform(model: Any, rows: Any) -> Any:
    return model.transform(rows)


def _case(name: str, model: Any, rows: Any, bare: Any = _predict, tolerance: float = 0.0) -> Case:
    method = {_predict: "predict", _probabilities: "predict_proba", _transform: "transform"}[bare]
    return Case(name, model, rows, bare, {"method": method}, tolerance)


LOGISTIC = make_pipeline(StandardScaler(), LogisticRegression()).fit(CANCER, MALIGNANT)
FOREST = RandomForestClassifier(20, random_state=0).fit(CANCER, MALIGNANT)
TWO_OUTPUTS = RandomForestRegressor(5, random_state=0).fit(DIABETES, np.column_stack([PROGRESS, -PROGRESS]))
CHURN = make_pipeline(
    make_column_transformer((OneHotEncoder(), ["plan"]), remainder="passthrough"),
    HistGradientBoostingClassifier(max_iter=10, random_state=0),
).fit(MIXED, CHURNED)
SENTIMENT = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(WORDS, np.char.startswith(WORDS, "b"))
SINGLE = DIABETES.astype("float32")

# A tolerance where BLAS sums a batch of one in another order than a batch of many.
CASES = [
    _case("pipeline on an array", LOGISTIC, CANCER),
    _case("probabilities", LOGISTIC, CANCER, _probabilities, 1e-12),
    _case("forest", FOREST, CANCER, _probabilities),
    _case("regression", LinearRegression().fit(DIABETES, PROGRESS), DIABETES, tolerance=1e-12),
    _case("several outputs", TWO_OUTPUTS, DIABETES),
    _case("string labels on a frame", LogisticRegression(max_iter=1000).fit(IRIS.data, SPECIES), IRIS.data),
    _case("mixed frame with column transformer", CHURN, MIXED, _probabilities),
    _case("neighbours", KNeighborsClassifier().fit(CANCER, MALIGNANT), CANCER),
    _case("text", SENTIMENT, WORDS),
    _case("transformer", StandardScaler().fit(CANCER), CANCER, _transform),
    _case("distances to clusters", KMeans(3, n_init=1, random_state=0).fit(DIABETES), DIABETES, _transform, 1e-9),
    _case("float32", LinearRegression().fit(SINGLE, PROGRESS), SINGLE, tolerance=1e-4),
]


class TestSklearn(FrameworkContract):
    @pytest.fixture
    def framework(self) -> Framework:
        return SklearnFramework()

    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param  # type: ignore[no-any-return]


FRAMEWORK = SklearnFramework()


class Mischief:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_is_not_opened_unless_allowed(tmp_path: Path) -> None:
    """With defaults no byte of a joblib file is run, and the sentence says how to allow it."""
    joblib.dump(Mischief(tmp_path / "ran"), tmp_path / "model.joblib")
    with pytest.raises(ArtifactUnsafe, match=r"ModelOptions\(allow_pickle=True\)"):
        FRAMEWORK.load(tmp_path / "model.joblib", "joblib", {})
    assert not (tmp_path / "ran").exists()


def test_a_pickle_under_another_name_is_not_opened(tmp_path: Path) -> None:
    """A pickle that calls itself a skops file is refused before anything reads it, at registration and at load."""
    fake = tmp_path / "model.skops"
    fake.write_bytes(pickle.dumps(Mischief(tmp_path / "ran")))
    with pytest.raises(ArtifactUnsafe):
        FRAMEWORK.load(fake, "skops", {"method": "predict"})
    with pytest.raises(ArtifactUnsafe):
        FRAMEWORK.save(fake, tmp_path, {})
    assert not (tmp_path / "ran").exists()


def test_types_that_need_trust_are_named_at_registration(tmp_path: Path) -> None:
    """A model with a foreign function is refused with the list to review, and accepted with that list."""
    model = make_pipeline(
        FunctionTransformer(np.linalg.norm, kw_args={"axis": 1, "keepdims": True}), LinearRegression()
    )
    model.fit(DIABETES, PROGRESS)
    with pytest.raises(ArtifactUnsafe, match=r"trusted=\[.*numpy\.linalg.*\]"):
        FRAMEWORK.save(model, tmp_path, {})
    trusted = ["numpy.linalg.norm", "numpy.linalg._linalg.norm"]
    saved = FRAMEWORK.save(model, tmp_path, {"trusted": trusted})
    assert set(saved.load_options["trusted"]) <= set(trusted)
    FRAMEWORK.load(saved.path, saved.format, saved.load_options)


def test_a_function_that_cannot_be_imported_elsewhere_is_refused(tmp_path: Path) -> None:
    """A lambda is not offered for trust: no trust would make it load where the model is served."""
    model = make_pipeline(FunctionTransformer(lambda x: x * 2), LinearRegression()).fit(DIABETES, PROGRESS)
    with pytest.raises(InvalidInput, match="define it in a module"):
        FRAMEWORK.save(model, tmp_path, {})


def test_what_was_not_trusted_at_registration_is_not_loaded(tmp_path: Path) -> None:
    """The list written down at registration is the whole list: a file with more in it is refused."""
    saved = FRAMEWORK.save(RandomForestClassifier(2).fit(CANCER, MALIGNANT), tmp_path, {})
    assert saved.load_options["trusted"] == ["sklearn.tree._tree.Tree"]
    with pytest.raises(ArtifactUnsafe, match="not trusted at registration"):
        FRAMEWORK.load(saved.path, saved.format, {"method": "predict", "trusted": []})


def test_what_skops_cannot_save_is_pointed_to_joblib(tmp_path: Path) -> None:
    """An estimator without a safe format gets an error that names the other one."""
    with pytest.raises(InvalidInput, match="format='joblib'"):
        FRAMEWORK.save(Birch(threshold=0.01).fit(DIABETES), tmp_path, {})


@pytest.mark.parametrize("method", ["no_such", "_fit", "n_features_in_", "coef_"])
def test_a_method_that_cannot_be_called_is_refused(method: str) -> None:
    """Only public methods of the estimator can be served."""
    with pytest.raises(InvalidInput, match="has no method"):
        FRAMEWORK.wrap(LinearRegression().fit(DIABETES, PROGRESS), {"method": method})


def test_sparse_answers_are_refused() -> None:
    """A sparse matrix has no row-wise form to answer with; the error says what to do."""
    model = FRAMEWORK.wrap(OneHotEncoder().fit([["a"], ["b"]]), {"method": "transform"})
    with pytest.raises(InferenceFailed, match="dense"):
        model.infer({"x": np.array([["a"]], dtype=object)})


def test_a_tuple_of_arrays_becomes_named_outputs() -> None:
    """A method that returns several arrays answers several outputs."""
    model = FRAMEWORK.wrap(KNeighborsClassifier(2).fit(CANCER, MALIGNANT), {"method": "kneighbors"})
    outputs = model.infer({"x": CANCER[:3]})
    assert {name: column.shape for name, column in outputs.items()} == {"output_0": (3, 2), "output_1": (3, 2)}


PLANS = pd.DataFrame({"plan": ["pro", "free", np.nan, "free", "pro", np.nan] * 10})
PAID = [1, 0, 0, 0, 1, 0] * 10
ENCODED = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
FILLED = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(), LogisticRegression())


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("estimator", [ENCODED, FILLED], ids=["encoded", "filled"])
@pytest.mark.parametrize(
    "frame",
    [PLANS, PLANS.replace(np.nan, None), PLANS.astype("category")],
    ids=["NaN", "None", "category"],
)
def test_a_missing_string_is_what_the_estimator_was_fitted_on(
    frame: pd.DataFrame, estimator: Any, executor: str, tmp_path: Path
) -> None:
    """NaN and None are two things to scikit-learn; a null of a request is the one that the example has."""
    fitted = clone(estimator).fit(frame, PAID)
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        registry.register("m", "1", fitted, example=frame[:3], method="predict_proba")
        registry.promote("m", "1")
        options = {"m": ms.ModelOptions(executor=executor)}  # type: ignore[arg-type]
        with ms.ModelServer(registry, options, cache_dir=tmp_path / "cache") as server:
            answers = server.predict_many("m", [{"plan": "pro"}, {"plan": "free"}, {"plan": None}])
    np.testing.assert_allclose([each.prediction for each in answers], fitted.predict_proba(frame[:3]))


def test_without_a_gap_in_the_example_a_missing_string_is_nan() -> None:
    """That is what pandas reads from a file, and what scikit-learn fills in by default; records of JSON have nulls."""
    fitted = clone(ENCODED).fit(PLANS, PAID)
    model = SklearnFramework().wrap(fitted, {"method": "predict_proba"})
    found = model.infer({"plan": np.array(["pro", None], dtype=object)})[SOLE_OUTPUT]
    np.testing.assert_allclose(found, fitted.predict_proba(PLANS[["plan"]].iloc[[0, 2]]))


@pytest.mark.parametrize(
    "estimator",
    [
        VotingClassifier([("tree", DecisionTreeClassifier()), ("line", LogisticRegression(max_iter=500))]),
        StackingClassifier([("tree", DecisionTreeClassifier())], LogisticRegression(), cv=3),
        GridSearchCV(DecisionTreeClassifier(), {"max_depth": [1, 2]}, cv=3),
        KNeighborsClassifier(algorithm="ball_tree", metric="manhattan"),
        GaussianProcessRegressor(Matern() + WhiteKernel()),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_what_scikit_learn_is_made_of_needs_no_trust(estimator: Any, tmp_path: Path) -> None:
    """Estimators around others, and those with trees and kernels inside, are saved and loaded by default."""
    rows = IRIS.data.to_numpy()
    fitted = estimator.fit(rows, IRIS.target)
    framework = SklearnFramework()
    saved = framework.save(fitted, tmp_path, {})
    loaded = framework.load(saved.path, saved.format, saved.load_options)
    np.testing.assert_allclose(loaded.infer({"x": rows})[SOLE_OUTPUT], fitted.predict(rows))


def _archive(schema: str | None) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("other" if schema is None else "schema.json", schema or "")
    return data.getvalue()


def _flipped() -> bytes:
    data = bytearray(skops.io.dumps(LinearRegression().fit(IRIS.data, IRIS.target)))
    data[60] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [_archive(None), _archive("{"), _archive("[]"), _archive("[" * 10_000), _archive('{"protocol": 99}'), _flipped()],
    ids=["no schema", "cut off", "a list", "deep", "protocol", "flipped"],
)
def test_a_broken_file_is_refused_in_words(tmp_path: Path, data: bytes) -> None:
    """Whatever is wrong with a file that is registered by its path, the error is the library's."""
    path = tmp_path / "model.skops"
    path.write_bytes(data)
    with pytest.raises(LoadFailed, match="skops cannot read the artifact"):
        SklearnFramework().save(path, tmp_path, {})
