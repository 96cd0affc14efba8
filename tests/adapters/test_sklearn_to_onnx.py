"""scikit-learn to ONNX: every kind of model answers as before, or is refused; and the proof itself."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightgbm
import numpy as np
import onnx
import pandas as pd
import pytest
import xgboost
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

import modelserve as ms
from modelserve import plugins
from modelserve.adapters.converters.sklearn_to_onnx import SklearnToOnnx
from modelserve.config import ModelOptions
from modelserve.errors import InvalidInput, MissingDependency
from modelserve.ports import SavedModel
from modelserve.registry import Registry, answers, conversion
from modelserve.server import AsyncModelServer
from modelserve.signature import unstack
from modelserve.testing.frameworks import FrameworkContract
from modelserve.types import Columns, Json

RANDOM = np.random.default_rng(0)
CANCER, MALIGNANT = load_breast_cancer(return_X_y=True)
DIABETES, PROGRESS = load_diabetes(return_X_y=True)
WINE, CULTIVAR = load_wine(return_X_y=True)
IRIS = load_iris(as_frame=True)
SPECIES = IRIS.target_names[IRIS.target]
HOLES = np.where(RANDOM.random(CANCER.shape) < 0.1, np.nan, CANCER)
BOTH = np.column_stack([PROGRESS, -PROGRESS])


def _mixed_frame() -> pd.DataFrame:
    """Numbers, text and booleans, as a table comes from a database."""
    return pd.DataFrame(
        {
            "the plan": RANDOM.choice(["free", "pro", "ünïcode"], 300),
            "tenure": RANDOM.integers(0, 60, 300),
            "active": RANDOM.random(300) > 0.5,
            "spend": RANDOM.normal(50, 20, 300),
        }
    )


MIXED = _mixed_frame()
HOLED = MIXED.assign(spend=MIXED["spend"].where(RANDOM.random(300) > 0.2))
CHURNED = (MIXED["tenure"] < 20) & ~MIXED["active"]
TEXTS = np.array([f"{a} {b}" for a in ("good", "bad", "fine", "poor") for b in ("food", "staff", "room", "view")] * 5)


def _columns(*, numbers: Any = "passthrough", encoder: Any = None) -> Any:
    encoder = encoder or OneHotEncoder(handle_unknown="ignore")
    return make_column_transformer((encoder, ["the plan"]), (numbers, ["tenure", "active", "spend"]))


@dataclasses.dataclass(frozen=True)
class Case:
    """A fitted model, rows that it takes, the method, and the way in which it comes out (None: it is refused)."""

    name: str
    model: Any
    rows: Any
    way: str | None
    method: str = "predict"

    def __str__(self) -> str:
        return self.name


def _booster(cls: Any, **more: Any) -> Any:
    return cls(n_estimators=10, random_state=0, n_jobs=1, **more)


XGB, XGB_R = partial(_booster, xgboost.XGBClassifier), partial(_booster, xgboost.XGBRegressor)
LGBM = partial(_booster, lightgbm.LGBMClassifier, verbose=-1)
LGBM_R = partial(_booster, lightgbm.LGBMRegressor, verbose=-1)
LOGISTIC = make_pipeline(StandardScaler(), LogisticRegression()).fit(CANCER, MALIGNANT)
FOREST = RandomForestClassifier(10, random_state=0).fit(CANCER, MALIGNANT)
HISTOGRAM = HistGradientBoostingClassifier(max_iter=10, random_state=0)
WORDED = np.array(["benign", "malignant"])[MALIGNANT]

CASES = [
    Case("logistic", LOGISTIC, CANCER, "double"),
    Case("logistic probabilities", LOGISTIC, CANCER, "double", "predict_proba"),
    Case("logistic scores", LOGISTIC, CANCER, "double", "decision_function"),
    Case("forest", FOREST, CANCER, "double"),
    Case("forest probabilities", FOREST, CANCER, "double", "predict_proba"),
    Case("strings as labels", RandomForestClassifier(5).fit(CANCER, WORDED), CANCER, "double"),
    Case("booleans as labels", RandomForestClassifier(5).fit(CANCER, MALIGNANT == 1), CANCER, "double"),
    Case("floats as labels", LogisticRegression(max_iter=9999).fit(WINE, CULTIVAR * 1.0), WINE, "double"),
    Case("forest regression", RandomForestRegressor(10, random_state=0).fit(DIABETES, PROGRESS), DIABETES, "double"),
    Case("two targets of a forest", RandomForestRegressor(5).fit(DIABETES, BOTH), DIABETES, "double"),
    Case("two targets", LinearRegression().fit(DIABETES, BOTH), DIABETES, "double"),
    Case("linear regression", LinearRegression().fit(DIABETES, PROGRESS), DIABETES, "double"),
    Case("float32", LinearRegression().fit(DIABETES.astype("float32"), PROGRESS), DIABETES.astype("float32"), "double"),
    Case("frame of numbers", LogisticRegression(max_iter=999).fit(IRIS.data, SPECIES), IRIS.data, "double"),
    Case("tree with gaps", DecisionTreeClassifier(random_state=0).fit(HOLES, MALIGNANT), HOLES, "double"),
    Case("tree with gaps that it never saw", DecisionTreeClassifier(random_state=0).fit(CANCER, MALIGNANT),
         HOLES, "double"),
    Case("forest with gaps", RandomForestClassifier(5, random_state=0).fit(HOLES, MALIGNANT),
         HOLES, "double", "predict_proba"),
    Case("gradient boosting", GradientBoostingClassifier(n_estimators=10).fit(CANCER, MALIGNANT), CANCER, "double"),
    Case("histogram", HISTOGRAM.fit(CANCER, MALIGNANT), CANCER, "double", "predict_proba"),
    Case("histogram with gaps", HistGradientBoostingClassifier(max_iter=10).fit(HOLES, MALIGNANT), HOLES, "double"),
    Case("histogram of three", HistGradientBoostingClassifier(max_iter=5).fit(WINE, CULTIVAR), WINE, "double"),
    Case("histogram scores", HISTOGRAM, CANCER, "double", "decision_function"),
    Case("histogram of counts", HistGradientBoostingRegressor(loss="poisson", max_iter=5).fit(DIABETES, PROGRESS),
         DIABETES, "double"),
    Case("table, boosted", make_pipeline(_columns(), HistGradientBoostingClassifier(max_iter=10)).fit(HOLED, CHURNED),
         HOLED, "double", "predict_proba"),
    Case("table, ordinal, forest",
         make_pipeline(_columns(encoder=OrdinalEncoder()), RandomForestClassifier(5)).fit(MIXED, CHURNED),
         MIXED, "double"),
    Case("table, logistic", make_pipeline(_columns(numbers=StandardScaler()), LogisticRegression()).fit(MIXED, CHURNED),
         MIXED, "double", "predict_proba"),
    Case("table, imputed",
         make_pipeline(_columns(numbers=make_pipeline(SimpleImputer(), StandardScaler())), LogisticRegression())
         .fit(HOLED, CHURNED), HOLED, "float", "predict_proba"),
    Case("search", GridSearchCV(LOGISTIC, {"logisticregression__C": [0.1, 1]}).fit(CANCER, MALIGNANT),
         CANCER, "double"),
    Case("text", make_pipeline(TfidfVectorizer(lowercase=False, token_pattern="[a-z]+"), LogisticRegression())
         .fit(TEXTS, np.char.startswith(TEXTS, "b")), TEXTS, "double"),
    Case("neighbours", KNeighborsClassifier().fit(CANCER, MALIGNANT), CANCER, "double", "predict_proba"),
    Case("support vectors", make_pipeline(StandardScaler(), SVC()).fit(CANCER, MALIGNANT), CANCER, "double"),
    Case("clusters", KMeans(3, n_init=1, random_state=0).fit(DIABETES), DIABETES, "double"),
    Case("scaled", StandardScaler().fit(CANCER), CANCER, "double", "transform"),
    Case("outliers", IsolationForest(n_estimators=10, random_state=0).fit(CANCER), CANCER, "float"),
    Case("xgboost", XGB().fit(CANCER, MALIGNANT), CANCER, "double"),
    Case("xgboost probabilities, gaps", XGB().fit(HOLES, MALIGNANT), HOLES, "double", "predict_proba"),
    Case("xgboost of three", XGB().fit(WINE, CULTIVAR), WINE, "double", "predict_proba"),
    Case("xgboost regression", XGB_R().fit(DIABETES, PROGRESS), DIABETES, "double"),
    Case("xgboost on a frame", XGB().fit(IRIS.data, IRIS.target), IRIS.data, "double"),
    Case("xgboost in a pipeline", make_pipeline(StandardScaler(), XGB()).fit(CANCER, MALIGNANT), CANCER, "double"),
    Case("lightgbm", LGBM().fit(CANCER, MALIGNANT), CANCER, "double"),
    Case("lightgbm probabilities, strings", LGBM().fit(CANCER, WORDED), CANCER, "double", "predict_proba"),
    Case("lightgbm of three", LGBM().fit(WINE, CULTIVAR), WINE, "double"),
    Case("lightgbm regression", LGBM_R().fit(DIABETES, PROGRESS), DIABETES, "double"),
    Case("lightgbm, table", make_pipeline(_columns(), LGBM()).fit(MIXED, CHURNED), MIXED, "double", "predict_proba"),
]  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        yield registry


def _register(registry: Registry, model: Any, rows: Any, method: str = "predict", **more: Any) -> ms.ModelVersion:
    options: dict[str, Any] = {"example": rows[:4], "signature": ms.Signature.infer(rows), "baseline": rows} | more
    return registry.register("m", "1", model, method=method, optimize="onnx", **options)


def _answers(model: Any, method: str, rows: Any) -> tuple[list[dict[str, Json]], list[Json]]:
    """Return the rows as requests, and what the estimator itself answers to them."""
    signature = ms.Signature.infer(rows)
    records = [signature.record(row) for row in signature.rows_of(rows)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X does not have valid feature names")  # LightGBM's, on arrays
        return records, unstack({"output": np.asarray(getattr(model, method)(rows))}, len(rows))


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_it_answers_as_the_estimator_does(case: Case, registry: Registry, tmp_path: Path) -> None:
    """Registered with optimize="onnx", a model is served by ONNX Runtime and gives the estimator's own answers."""
    version = _register(registry, case.model, case.rows, case.method)
    assert (version.framework, version.artifact.format) == ("onnx", "onnx")
    assert version.conversion is not None
    assert version.conversion["way"] == case.way
    assert version.conversion["rows"] == version.conversion["equal_labels"] == len(case.rows) + 4
    registry.promote("m", "1")
    records, expected = _answers(case.model, case.method, case.rows[:32])
    async with AsyncModelServer(registry, cache_dir=tmp_path / "cache") as server:
        found = [answer.prediction for answer in await server.predict_many("m", records)]
    FrameworkContract.assert_same(found, expected, 0.0 if isinstance(expected[0], str | int) else 1e-5)
    assert list(map(type, found)) == list(map(type, expected))


SERVED = ("forest probabilities", "strings as labels", "table, boosted", "xgboost regression")


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SERVED], ids=str)
async def test_a_converted_model_is_served_by_threads_and_processes(
    case: Case, executor: Literal["thread", "process"], registry: Registry, tmp_path: Path
) -> None:
    """Whoever runs it, a converted model answers as the bare estimator does, alone and in a batch."""
    _register(registry, case.model, case.rows, case.method)
    registry.promote("m", "1")
    records, expected = _answers(case.model, case.method, case.rows[:20])
    options = {"m": ModelOptions(executor=executor, timeout_ms=30_000)}
    async with AsyncModelServer(registry, options, cache_dir=tmp_path / "cache") as server:
        found = [answer.prediction for answer in await server.predict_many("m", records)]
        alone = (await server.predict("m", records[0])).prediction
    tolerance = 0.0 if isinstance(expected[0], str | int) else 1e-5
    FrameworkContract.assert_same([*found, alone], [*expected, expected[0]], tolerance)


# -- what is refused ---------------------------------------------------------------------------------------


def _doubled(rows: Any) -> Any:
    return rows * 2


CODES = CULTIVAR[:, None] * 1.0
CATEGORICAL = HistGradientBoostingClassifier(max_iter=5, categorical_features=[0])
NULLS = pd.DataFrame({"the plan": np.array(["free", None, "pro", "free"] * 10, dtype=object)})
IMPUTED = make_pipeline(
    make_column_transformer((SimpleImputer(strategy="most_frequent", missing_values=None), ["the plan"])),
    OneHotEncoder(sparse_output=False),
)
FITTED_ON_TWO = RandomForestClassifier(2).fit(WINE, np.column_stack([CULTIVAR, CULTIVAR]))


@pytest.mark.parametrize(
    ("model", "rows", "method", "words"),
    [
        (FITTED_ON_TWO, WINE, "predict_proba", "method: 'predict_proba' gives several outputs"),
        (FOREST, CANCER, "apply", "method: 'apply' is not converted, only predict"),
        (StandardScaler().fit(WINE), WINE, "predict", "method: StandardScaler has no method 'predict'"),
        (CATEGORICAL.fit(CODES, CULTIVAR), CODES, "predict", "categorical features"),
        (make_pipeline(FunctionTransformer(_doubled), LinearRegression()).fit(WINE, CULTIVAR), WINE, "predict",
         "LinearRegression cannot be converted: double: "),
        (DecisionTreeClassifier().fit(WINE, CULTIVAR), WINE[:, :5], "predict", "example: the model does not answer it"),
        (IMPUTED.fit(NULLS), NULLS, "transform", "optimize: .*(no missing strings|cannot be converted)"),
        (LGBM(boosting_type="rf", bagging_freq=1, bagging_fraction=0.5).fit(WINE, CULTIVAR), WINE, "predict",
         r"boosting_type='rf'"),
        (LGBM(zero_as_missing=True).fit(WINE, CULTIVAR), WINE, "predict", "zero_as_missing"),
        (_booster(xgboost.XGBClassifier, booster="gblinear").fit(WINE, CULTIVAR), WINE, "predict", "booster='gbtree'"),
        (_booster(xgboost.XGBClassifier, missing=-1).fit(WINE, CULTIVAR), WINE, "predict", "missing values are not"),
        (LGBM().fit(WINE, CULTIVAR), WINE, "predict_proba", None),
    ],
    ids=["several", "apply", "no method", "categorical", "function", "example", "nulls", "rf", "zero", "linear",
         "missing", "control"],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_in_words(
    model: Any, rows: Any, method: str, words: str | None, registry: Registry
) -> None:
    """A model that has no form in ONNX gets no version, and the error says what is in the way."""
    if words is None:
        assert _register(registry, model, rows, method).conversion
        return
    with pytest.raises(InvalidInput, match=words):
        _register(registry, model, rows, method)
    assert registry.models() == []


def test_labels_that_are_fractions_are_refused(tmp_path: Path) -> None:
    """The library would cut 0.5 to 0 without a word."""
    model = DecisionTreeClassifier().fit(WINE, CULTIVAR.astype(str))
    model.classes_ = np.array([0.0, 0.5, 1.0])
    with pytest.raises(InvalidInput, match="fractions cannot be converted"):
        next(SklearnToOnnx().convert(model, tmp_path, {}, {"x": WINE[:4]}))


def test_an_example_is_needed(registry: Registry) -> None:
    """Without a row there is nothing to prove a conversion with."""
    signature = ms.Signature.infer(CANCER)
    with pytest.raises(InvalidInput, match="example: a conversion is proven on example rows"):
        registry.register("m", "1", FOREST, signature=signature, optimize="onnx")


def test_a_file_is_not_converted(registry: Registry, tmp_path: Path) -> None:
    """A path holds no live model to compare with."""
    saved = plugins.framework("sklearn").save(LOGISTIC, tmp_path, {})
    with pytest.raises(InvalidInput, match="optimize: give the fitted model itself"):
        registry.register("m", "1", saved.path, example=CANCER[:4], optimize="onnx")


@pytest.mark.parametrize(("name", "value"), [("format", "joblib"), ("factory", "a:b"), ("trusted", ["x"])])
def test_options_that_a_conversion_has_no_use_for_are_refused(registry: ms.Registry, name: str, value: Any) -> None:
    """Nothing that was asked for is quietly left out."""
    with pytest.raises(InvalidInput, match=f"^{name}: leave it out with optimize="):
        registry.register("m", "1", FOREST, example=CANCER[:4], optimize="onnx", **{name: value})


@pytest.mark.parametrize("package", ["skl2onnx", "onnxruntime"])
def test_a_missing_converter_answers_with_its_install_line(
    registry: ms.Registry, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not installed is not taken for a model that cannot be converted."""
    for name in [*sys.modules, package]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pip install 'modelserve\[onnx\]'"):
        registry.register("m", "1", FOREST, example=CANCER[:4], optimize="onnx")


def test_probabilities_stay_between_0_and_1(registry: ms.Registry) -> None:
    """Sums in float32 do not make a probability that is none."""
    registry.register("m", "1", FOREST, example=CANCER[:4], method="predict_proba", optimize="onnx", baseline=CANCER)
    registry.promote("m", "1")
    with ms.ModelServer(registry) as server:
        answers = np.array([each.prediction for each in server.predict_many("m", [{"x": row} for row in CANCER[:200]])])
    assert answers.min() >= 0.0
    assert answers.max() <= 1.0


def test_an_unknown_target_is_refused(registry: Registry) -> None:
    """The error lists what models can be turned into."""
    with pytest.raises(InvalidInput, match=r"optimize: cannot turn a sklearn model into 'tensorrt'.* to 'onnx'"):
        registry.register("m", "1", FOREST, example=CANCER[:4], optimize="tensorrt")


def test_a_baseline_without_a_conversion_is_refused(registry: Registry) -> None:
    """A baseline that would prove nothing is not taken in silence."""
    with pytest.raises(InvalidInput, match="baseline: it proves a conversion"):
        registry.register("m", "1", FOREST, example=CANCER[:4], baseline=CANCER)


def test_a_baseline_row_that_the_signature_refuses_is_named(registry: Registry) -> None:
    """Gaps in the baseline where the example has none are an error about that column of the baseline."""
    rows = IRIS.data.copy()
    rows.iloc[7, 2] = np.nan
    model = HistGradientBoostingClassifier(max_iter=2).fit(rows, IRIS.target)
    with pytest.raises(InvalidInput) as refused:
        registry.register("m", "1", model, example=rows[:4], optimize="onnx", baseline=rows)
    assert refused.value.field == "baseline.petal length (cm)"


def test_gaps_are_proven_where_they_may_be_sent(registry: Registry) -> None:
    """A signature that allows missing values needs rows that have some, or nothing would be known of them."""
    signature = ms.Signature([ms.Field(str(name), "float64", nullable=True) for name in IRIS.data.columns])
    with pytest.raises(InvalidInput, match=r"baseline: no row lacks a value of 'sepal length \(cm\)'"):
        _register(registry, LogisticRegression(max_iter=999).fit(IRIS.data, SPECIES), IRIS.data, signature=signature)


# -- the proof ---------------------------------------------------------------------------------------------


class Liar:
    """A converter whose first way answers something else, and whose second does not load."""

    framework = "onnx"

    def convert(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns) -> Iterator[SavedModel]:
        other = LogisticRegression(max_iter=9999).fit(StandardScaler().fit_transform(CANCER), 1 - MALIGNANT)
        for saved in SklearnToOnnx().convert(other, folder, options, example):
            yield saved
            break
        broken = folder / "broken.onnx"
        broken.write_bytes(b"nothing")
        yield SavedModel(broken, "onnx", {})


def test_a_converted_model_that_answers_differently_is_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not answer as the original gets no version; the error counts the rows, for each way that was tried."""
    monkeypatch.setattr(plugins, "converter", lambda *_: Liar())
    with pytest.raises(InvalidInput, match=r"no converted model answers.*rows differ.*; broken: .*not an ONNX model"):
        _register(registry, LOGISTIC, CANCER)
    assert registry.models() == []


def _around(thresholds: Any) -> Any:
    """Return the thresholds, their neighbours as doubles, and as floats."""
    t = np.asarray(thresholds, dtype="float64")
    single = t.astype("float32")
    near = [np.nextafter(t, -np.inf), t, np.nextafter(t, np.inf), single.astype("float64")]
    near += [np.nextafter(single, np.float32(side)).astype("float64") for side in (-np.inf, np.inf)]
    return np.concatenate(near)


def test_trees_decide_at_their_thresholds_as_the_original_does(registry: Registry) -> None:
    """At every threshold, and a digit to either side of it, the converted trees take the original's branch."""
    rows = RANDOM.normal(size=(2000, 1))
    target = np.sin(5 * rows[:, 0])
    for i, model in enumerate([
        DecisionTreeRegressor(max_depth=8).fit(rows, target),
        RandomForestRegressor(3, max_depth=5).fit(rows, target),
        HistGradientBoostingRegressor(max_iter=5).fit(rows, target),
        GradientBoostingRegressor(n_estimators=5).fit(rows, target),
        XGB_R().fit(rows, target),
    ]):  # fmt: skip
        near = _around(_thresholds(model))
        version = registry.register(
            "m", str(i), model, example=rows[:4], baseline=near[:, None], optimize="onnx"
        )  # fmt: skip
        assert version.conversion is not None
        assert version.conversion["differing"] == 0
        assert version.conversion["rows"] > 50


def _thresholds(model: Any) -> Any:
    if hasattr(model, "get_booster"):
        splits = model.get_booster().trees_to_dataframe()["Split"].dropna()
        return splits.to_numpy()
    if hasattr(model, "_predictors"):
        nodes = np.concatenate([tree.nodes for trees in model._predictors for tree in trees])
        return nodes["num_threshold"][nodes["is_leaf"] == 0]
    trees = [each.tree_ for each in np.ravel(getattr(model, "estimators_", [model]))]
    return np.concatenate([tree.threshold[tree.feature >= 0] for tree in trees])


def _stump() -> tuple[Any, float]:
    """Return one split of LightGBM, which compares doubles, with a threshold above the float32 nearest to it."""
    for shift in range(100):
        rows = np.linspace(0, 1, 200)[:, None] + shift / 7
        model = lightgbm.LGBMRegressor(n_estimators=1, num_leaves=2, min_child_samples=1, verbose=-1)
        model.fit(rows, (np.arange(200) > 90) * 1.0)
        threshold = model.booster_.dump_model()["tree_info"][0]["tree_structure"]["threshold"]
        if float(np.float32(threshold)) < threshold:
            return model, float(threshold)
    raise AssertionError("no such threshold")


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_a_row_at_a_threshold_is_told_from_one_that_is_wrong(registry: Registry) -> None:
    """A row that differs only because a float32 decides otherwise is counted, up to one in a thousand."""
    model, threshold = _stump()
    rows = np.linspace(threshold - 1, threshold + 1, 3000)[:, None]
    rows[10] = np.nextafter(threshold, np.inf)
    version = _register(registry, model, rows)
    assert version.conversion is not None
    assert (version.conversion["differing"], version.conversion["at_thresholds"]) == (1, 1)
    assert version.conversion["largest_difference"] > 0.01

    rows[10:20] = np.nextafter(threshold, np.inf)
    with pytest.raises(
        InvalidInput, match=r"10 of 3004 rows differ .*, 10 of them because a float32 decides otherwise"
    ):
        registry.register("m", "2", model, example=rows[-4:], baseline=rows, optimize="onnx")


def test_the_report_is_kept_with_the_version(registry: Registry) -> None:
    """What was proven can be read from the registry later."""
    _register(registry, LOGISTIC, CANCER)
    report = registry.get("m", "1").conversion
    assert report == {
        "to": "onnx",
        "way": "double",
        "tolerance": 1e-5,
        "rows": 573,
        "equal_labels": 573,
        "largest_difference": 0.0,
        "differing": 0,
        "at_thresholds": 0,
    }


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        ([1.0, np.nan, np.inf], [1.0 + 5e-6, np.nan, np.inf], [True, True, True]),
        ([1.0, np.nan, np.inf, np.inf], [1.1, 0.0, -np.inf, np.nan], [False, False, False, False]),
        ([1e9], [1e9 + 1], [True]),
        ([1.0, 2.0], [1, 2], [True, True]),
        ([1, 2], [1.0, 2.0], [False, False]),
        (["a", "b"], ["a", "c"], [True, False]),
        ([True, False], [1, 0], [False, False]),
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.5]], [True, False]),
        ([1.0, 2.0], [[1.0], [2.0]], [False, False]),
    ],
)
def test_what_counts_as_the_same_answer(wanted: Any, found: Any, same: list[bool]) -> None:
    """Numbers within the tolerance, gaps and infinities alike, labels of the same type; nothing else."""
    answer = conversion._same({"output": np.array(wanted)}, {"output": np.array(found)}, len(wanted))
    assert answer.tolist() == same
    assert not conversion._same({"output": np.array(wanted)}, {"another": np.array(found)}, len(wanted)).any()


@dataclasses.dataclass
class Shrunk:
    """Answers a number per row, or the same for half of the rows."""

    halved: bool

    def infer(self, columns: Columns) -> Columns:
        rows = len(columns["x"])
        return {"output": np.zeros(rows // 2 if self.halved else rows)}


def test_an_answer_of_another_length_is_an_error() -> None:
    """A candidate that loses rows is refused before anything is compared."""
    signature = ms.Signature.infer(CANCER)
    rows = signature.rows_of(CANCER, 4)
    assert answers.answers_of(Shrunk(halved=False), signature, rows) == [0.0] * 4
    with pytest.raises(InvalidInput, match="answered 2 rows for 4"):
        answers.answers_of(Shrunk(halved=True), signature, rows)


def test_only_what_leads_to_the_answer_is_kept(tmp_path: Path) -> None:
    """The graph takes the user's inputs by name and type, and computes one answer."""
    model = make_pipeline(_columns(), RandomForestClassifier(3)).fit(MIXED, CHURNED)
    signature = ms.Signature.infer(MIXED)
    example = signature.stack(signature.rows_of(MIXED, 4))  # noqa: PD013  # no DataFrame's
    double, single = list(SklearnToOnnx().convert(model, tmp_path, {"method": "predict_proba"}, example))
    assert (double.path.name, single.path.name) == ("double.onnx", "float.onnx")
    graph = onnx.load(double.path).graph
    kinds = {each.name: onnx.TensorProto.DataType.Name(each.type.tensor_type.elem_type) for each in graph.input}
    assert kinds == {"the plan": "STRING", "tenure": "INT64", "active": "BOOL", "spend": "DOUBLE"}
    assert [each.name for each in graph.output] == ["output"]
    assert "ZipMap" not in {node.op_type for node in graph.node}
