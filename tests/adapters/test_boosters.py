"""XGBoost and LightGBM through the scikit-learn interface, in formats of their own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightgbm import Booster as LightGBMBooster
from lightgbm import LGBMClassifier, LGBMRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import Booster, XGBClassifier, XGBRegressor

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn import SklearnFramework
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.ports import Framework
from modelserve.testing.frameworks import Case, FrameworkContract
from modelserve.types import Runtime

CANCER, MALIGNANT = load_breast_cancer(return_X_y=True)
DIABETES, PROGRESS = load_diabetes(return_X_y=True)
IRIS = load_iris(as_frame=True)
SPECIES = IRIS.target_names[IRIS.target]
BOTH = np.column_stack([PROGRESS, -PROGRESS])

BINARY = XGBClassifier(n_estimators=5, n_jobs=1).fit(CANCER, MALIGNANT)
NAMED = LGBMClassifier(n_estimators=5, n_jobs=1, verbose=-1).fit(IRIS.data, SPECIES)


def _predict(model: Any, rows: Any) -> Any:
    return model.predict(rows)


def _probabilities(model: Any, rows: Any) -> Any:
    return model.predict_proba(rows)


def _case(name: str, model: Any, rows: Any, bare: Any = _predict, **options: Any) -> Case:
    method = {_predict: "predict", _probabilities: "predict_proba"}[bare]
    return Case(name, model, rows, bare, {"method": method} | options)


CASES = [
    _case("xgboost labels", BINARY, CANCER),
    _case("xgboost probabilities", BINARY, CANCER, _probabilities),
    _case("xgboost on a frame", XGBClassifier(n_estimators=3).fit(IRIS.data, IRIS.target), IRIS.data, _probabilities),
    _case("xgboost with several outputs", XGBRegressor(n_estimators=3).fit(DIABETES, BOTH), DIABETES),
    _case(
        "xgboost in a pipeline, which is trusted",
        make_pipeline(StandardScaler(), XGBClassifier(n_estimators=5)).fit(CANCER, MALIGNANT),
        CANCER,
        trusted=["xgboost.core.Booster", "xgboost.sklearn.XGBClassifier"],
    ),
    _case("lightgbm with string labels", NAMED, IRIS.data),
    _case("lightgbm probabilities", NAMED, IRIS.data, _probabilities),
    _case(
        "lightgbm with two classes",
        LGBMClassifier(n_estimators=5, verbose=-1).fit(CANCER, MALIGNANT),
        CANCER,
        _probabilities,
    ),
    _case("lightgbm regression", LGBMRegressor(n_estimators=5, verbose=-1).fit(DIABETES, PROGRESS), DIABETES),
]


class TestBoosters(FrameworkContract):
    @pytest.fixture
    def framework(self) -> Framework:
        return SklearnFramework()

    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param  # type: ignore[no-any-return]


FRAMEWORK = SklearnFramework()


@pytest.mark.parametrize(("model", "expected"), [(BINARY, "xgboost-json"), (NAMED, "lightgbm-text")])
def test_an_estimator_is_kept_in_its_librarys_own_format(model: Any, expected: str, tmp_path: Path) -> None:
    """The default is neither a pickle nor a format that would need types to be trusted."""
    assert plugins.framework_of(model) == "sklearn"
    saved = FRAMEWORK.save(model, tmp_path, {})
    assert saved.format == expected
    assert not saved.runs_code


@pytest.mark.parametrize(("model", "name"), [(BINARY, "xgboost-json"), (NAMED, "lightgbm-text")])
def test_a_pickle_in_place_of_a_booster_is_not_opened(model: Any, name: str, tmp_path: Path) -> None:
    """What does not begin as the format does reaches no parser, at registration and at load."""
    saved = FRAMEWORK.save(model, tmp_path, {})
    saved.path.write_bytes(pickle.dumps(model))
    with pytest.raises(ArtifactUnsafe, match="not opened"):
        FRAMEWORK.load(saved.path, name, saved.load_options)
    with pytest.raises(ArtifactUnsafe, match="not opened"):
        FRAMEWORK.save(saved.path, tmp_path, {"format": name})


@pytest.mark.parametrize("model", [BINARY, NAMED], ids=["xgboost", "lightgbm"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_booster_that_was_cut_short_is_a_typed_error(model: Any, kept: float, tmp_path: Path) -> None:
    """A parser that would end the process, as LightGBM's does on a part of a file, is not reached."""
    saved = FRAMEWORK.save(model, tmp_path, {})
    whole = saved.path.read_bytes()
    saved.path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(LoadFailed, match="cannot read the artifact"):
        FRAMEWORK.load(saved.path, saved.format, saved.load_options)


def test_a_booster_registered_by_its_path_answers_numbers_of_classes(tmp_path: Path) -> None:
    """LightGBM's text holds no labels: without the estimator they are numbered, as the library does."""
    path = FRAMEWORK.save(NAMED, tmp_path, {}).path
    saved = FRAMEWORK.save(path, tmp_path, {"format": "lightgbm-text"})
    outputs = FRAMEWORK.load(saved.path, saved.format, saved.load_options).infer({"x": IRIS.data.to_numpy()[[0, 149]]})
    assert outputs["output"].tolist() == [0, 2]


def test_a_booster_keeps_to_its_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of one batch are those that the replica was given, inside the host's process too."""
    asked: list[Any] = []
    monkeypatch.setattr(LightGBMBooster, "predict", lambda _, rows, num_threads: asked.append(num_threads))
    for model, threads in ((BINARY, 3), (NAMED, 2)):
        saved = FRAMEWORK.save(model, tmp_path, {"method": "predict_proba"})
        loaded = FRAMEWORK.load(saved.path, saved.format, saved.load_options, Runtime(threads=threads))
        estimator = loaded._call.__self__
        if isinstance(estimator, XGBClassifier):
            asked.append(estimator.n_jobs)
        else:
            estimator._scores.predict(CANCER[:1])
    assert asked == [3, 2]


def test_a_bare_booster_is_refused(tmp_path: Path) -> None:
    """Without the estimator around it there is nothing that says how to answer; the error names what there is."""
    with pytest.raises(InvalidInput, match="XGBClassifier"):
        FRAMEWORK.save(BINARY.get_booster(), tmp_path, {})
    assert isinstance(BINARY.get_booster(), Booster)


@pytest.mark.parametrize(
    ("runtime", "problem"),
    [(Runtime(device="cuda:0"), "runs on the CPU"), (Runtime(compile=True), "optimize='onnx'")],
)
def test_what_scikit_learn_does_not_have_is_refused(runtime: Runtime, problem: str, tmp_path: Path) -> None:
    """An option that would be ignored is an error that says what to do instead."""
    saved = FRAMEWORK.save(BINARY, tmp_path, {})
    with pytest.raises(LoadFailed, match=problem):
        FRAMEWORK.load(saved.path, saved.format, saved.load_options, runtime)
