"""XGBoost and LightGBM through the scikit-learn interface, in formats of their own."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightgbm import Booster as LightGBMBooster
from lightgbm import LGBMClassifier, LGBMRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import Booster, XGBClassifier, XGBRegressor

from modelserve import plugins
from modelserve.adapters.frameworks.sklearn import SklearnFramework
from modelserve.config import ModelOptions
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.ports import Framework
from modelserve.registry import Registry
from modelserve.sync_server import ModelServer
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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("left_child=", "left_child=99 "),
        ("right_child=", "right_child=0 "),
        ("split_feature=", "split_feature=4000 "),
        ("num_leaves=", "num_leaves=9"),
        ("internal_count=", "internal_count=1 "),
        ("num_class=", "num_class=a"),
        ("num_class=", "num_class=10000000000"),
        ("max_feature_idx=", "max_feature_idx=-"),
        ("Tree=1", "Tree=7"),
    ],
)
def test_a_tree_that_does_not_hang_together_is_a_typed_error(before: str, after: str, tmp_path: Path) -> None:
    """Branches that lead nowhere, or back, reach no parser that would follow them: neither here nor when served."""
    saved = FRAMEWORK.save(NAMED, tmp_path, {})
    header, blank, trees = saved.path.read_text(encoding="utf-8").partition("\n\n")
    if before in header:
        header = header.replace(before, after, 1)
    else:
        sizes = header.rpartition("tree_sizes=")[2].split()
        place = int(before == "Tree=1")
        change = len(after) - len(before)
        changed = [str(int(size) + change * (i == place)) for i, size in enumerate(sizes)]
        header = header.replace(" ".join(sizes), " ".join(changed))
        trees = trees.replace(before, after, 1)
    saved.path.write_text(f"{header}{blank}{trees}", encoding="utf-8")
    with pytest.raises(LoadFailed, match="cannot read the artifact"):
        FRAMEWORK.load(saved.path, saved.format, saved.load_options)
    with pytest.raises(LoadFailed, match="cannot read the artifact"):
        FRAMEWORK.save(saved.path, tmp_path, {"format": "lightgbm-text"})


def test_trees_with_categories_are_whole(tmp_path: Path) -> None:
    """Categorical branches pass the check, and answer as before."""
    rows = np.column_stack([np.arange(400) % 7, np.random.default_rng(0).normal(size=400)])
    model = LGBMClassifier(n_estimators=5, verbose=-1, min_child_samples=1, categorical_feature=[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LightGBM warns of its own argument
        model.fit(rows, rows[:, 0] % 3 == 1)
        saved = FRAMEWORK.save(model, tmp_path, {"method": "predict_proba"})
        assert "num_cat=0" not in saved.path.read_text(encoding="utf-8").partition("Tree=1")[0]
        loaded = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
        assert np.array_equal(loaded.infer({"x": rows})["output"], model.predict_proba(rows))


def test_the_number_that_stands_for_none_is_kept(tmp_path: Path) -> None:
    """XGBoost's file does not say it, so it is written down beside it; rows with it are answered as before."""
    rows = DIABETES.copy()
    rows[::3, 0] = -999.0
    model = XGBRegressor(n_estimators=5, missing=-999.0).fit(rows, PROGRESS)
    saved = FRAMEWORK.save(model, tmp_path, {})
    loaded = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
    assert np.array_equal(loaded.infer({"x": rows})["output"], model.predict(rows))


def test_a_file_says_itself_whether_it_classifies(tmp_path: Path) -> None:
    """Whatever a classifier was trained for, its file is registered by its path."""
    model = XGBClassifier(n_estimators=3, objective="binary:hinge").fit(CANCER, MALIGNANT)
    saved = FRAMEWORK.save(FRAMEWORK.save(model, tmp_path, {}).path, tmp_path, {})
    loaded = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
    assert np.array_equal(loaded.infer({"x": CANCER})["output"], model.predict(CANCER))


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


# -- what a file by path says of its columns ---------------------------------------------------------------

CITIES = pd.DataFrame(
    {"city": pd.Categorical([[30, 10, 40, 20][i % 4] for i in range(200)]), "n": np.arange(200.0) % 7, "m": 1.0}
)
IS_EARLY = CITIES["city"].isin([30, 10]).astype(int)
CODES = CITIES.assign(city=CITIES["city"].cat.codes.astype(float))


def _boosters() -> dict[str, Any]:
    return {
        "lightgbm": LGBMClassifier(n_estimators=5, verbose=-1, min_child_samples=1),
        "xgboost": XGBClassifier(n_estimators=5, enable_categorical=True),
    }


def _file(model: Any, folder: Path) -> Path:
    """Write a booster as its own library does."""
    if isinstance(model, XGBClassifier):
        model.save_model(folder / "model.json")
        return folder / "model.json"
    model.booster_.save_model(folder / "model.txt")
    return folder / "model.txt"


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("given", ["estimator", "path"])
def test_a_booster_that_goes_by_the_categories_of_a_frame_is_refused(library: str, given: str, tmp_path: Path) -> None:
    """A request brings the city, and the trees know its number in a column that was; the sentence says what to do."""
    model = _boosters()[library].fit(CITIES, IS_EARLY)
    with pytest.raises(InvalidInput, match=r"model: it was fitted on a pandas category.*cat\.codes"):
        FRAMEWORK.save(model if given == "estimator" else _file(model, tmp_path), tmp_path, {})


def test_what_xgboost_wrote_before_it_kept_categories_is_refused(tmp_path: Path) -> None:
    """An older file has the types of its columns, and their names, but not what the categories were."""
    path = _file(_boosters()["xgboost"].fit(CITIES, IS_EARLY), tmp_path)
    document = json.loads(path.read_bytes())
    del document["learner"]["gradient_booster"]["model"]["cats"]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InvalidInput, match="pandas category"):
        FRAMEWORK.save(path, tmp_path, {})


def test_numbers_that_were_declared_to_be_categories_are_served(tmp_path: Path) -> None:
    """They stand for themselves: the number that a request brings is the one that the trees know."""
    rows = CODES.to_numpy()
    model = XGBClassifier(n_estimators=5, enable_categorical=True, feature_types=["c", "q", "q"]).fit(rows, IS_EARLY)
    for given in (model, _file(model, tmp_path)):
        saved = FRAMEWORK.save(given, tmp_path, {})
        loaded = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
        assert loaded.infer({"x": rows})["output"].tolist() == IS_EARLY.tolist()


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("given", ["estimator", "path"])
def test_columns_go_where_their_names_are(library: str, given: str, tmp_path: Path) -> None:
    """The file says what its columns are called: an example may have them in any order, and no others."""
    rows = CODES.rename(columns={"n": "day of week"})
    model = _boosters()[library].fit(rows, IS_EARLY)
    reversed_ = rows[list(reversed(rows.columns))]
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        source = model if given == "estimator" else _file(model, tmp_path)
        registry.register("m", "1", source, example=reversed_[:4], framework="sklearn")
        registry.promote("m", "1")
        with ModelServer(registry, {"m": ModelOptions(executor="thread")}, cache_dir=tmp_path / "cache") as server:
            found = server.predict_many(
                "m", [{str(name): row[name] for name in row} for row in reversed_.to_dict("records")]
            )
        with pytest.raises(InvalidInput, match=r"^street: .*was not fitted on it, but on city, day.of.week, m"):
            registry.register("m", "2", source, example=rows.rename(columns={"city": "street"}), framework="sklearn")
    assert [each.prediction for each in found] == IS_EARLY.tolist()


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_columns_of_a_booster_that_was_fitted_on_an_array_go_by_place(library: str, tmp_path: Path) -> None:
    """There are no names to go by, and the caller's own call goes by the place as well."""
    model = _boosters()[library].fit(CODES.to_numpy(), IS_EARLY)
    saved = FRAMEWORK.save(_file(model, tmp_path), tmp_path, {})
    loaded = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
    columns = {str(name): CODES[name].to_numpy() for name in CODES}
    assert loaded.infer(columns)["output"].tolist() == IS_EARLY.tolist()


def test_a_version_from_before_goes_by_place(tmp_path: Path) -> None:
    """What a row of an earlier release does not say of the columns is not read into it."""
    saved = FRAMEWORK.save(_boosters()["lightgbm"].fit(CODES, IS_EARLY), tmp_path, {})
    options = {name: value for name, value in saved.load_options.items() if name != "names"}
    loaded = FRAMEWORK.load(saved.path, saved.format, options)
    columns = {f"column {i}": CODES[name].to_numpy() for i, name in enumerate(CODES)}
    assert loaded.infer(columns)["output"].tolist() == IS_EARLY.tolist()
