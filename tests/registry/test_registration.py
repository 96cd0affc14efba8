"""What ``register`` keeps of a model, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression

import modelserve as ms

X = np.arange(12.0).reshape(6, 2)
Y = np.array([0, 0, 0, 1, 1, 1])
FRAME = pd.DataFrame({"age": [31, 42, 53], "plan": ["a", "b", "a"], "spend": [1.0, np.nan, 3.0]})


class Constant(BaseEstimator):  # type: ignore[misc]
    """An estimator that answers the same to everything, in a type of its own."""

    def __init__(self, answer: Any = 1.0) -> None:
        self.answer = answer

    def predict(self, x: Any) -> Any:
        if callable(self.answer):
            return self.answer(x)
        return np.array([self.answer] * len(x))


class Forgetful(Constant):
    """Answers differently once it was saved and loaded."""

    def __getstate__(self) -> dict[str, Any]:
        return {"answer": 2.0}


class Tripwire:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """An empty registry in SQLite with a local store."""
    return ms.Registry(f"sqlite:///{tmp_path}/models.db", artifacts=str(tmp_path / "store"))


def test_a_version_pins_its_bytes(registry: ms.Registry, tmp_path: Path) -> None:
    """The row holds key, SHA-256, size and format of the bytes that lie in the store."""
    version = registry.register(
        "m", "1.0", LinearRegression().fit(X, Y), example=X[:2], metrics={"auc": 0.9}, tags={"by": "me"}
    )
    data = (tmp_path / "store" / version.artifact.key).read_bytes()
    assert version.artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert (version.artifact.size, version.artifact.format) == (len(data), "skops")
    assert (version.status, version.framework) == ("staging", "sklearn")
    assert (version.metrics, version.tags) == ({"auc": 0.9}, {"by": "me"})
    assert registry.get("m", "1.0") == version


def test_the_golden_example_is_kept_with_the_models_answers(registry: ms.Registry, tmp_path: Path) -> None:
    """A few rows and the live model's answers to them are stored by content beside the model."""
    model = LinearRegression().fit(X, Y)
    version = registry.register("m", "1", model, example=X)
    assert version.example is not None
    example = json.loads((tmp_path / "store" / version.example.key).read_bytes())
    assert example["inputs"] == [{"x": row.tolist()} for row in X]
    assert example["outputs"] == pytest.approx(model.predict(X))


def test_the_signature_comes_from_the_example(registry: ms.Registry) -> None:
    """A DataFrame gives one input per column, missing values included."""
    version = registry.register("m", "1", Constant(), example=FRAME, trusted=[f"{__name__}.Constant"])
    assert version.signature["inputs"] == [
        {"name": "age", "dtype": "int64", "shape": [], "nullable": False},
        {"name": "plan", "dtype": "string", "shape": [], "nullable": False},
        {"name": "spend", "dtype": "float64", "shape": [], "nullable": True},
    ]


def test_an_explicit_signature_needs_no_example(registry: ms.Registry) -> None:
    """With ``signature=`` a version can be registered without rows; it has no golden example then."""
    signature = ms.Signature([ms.Field("x", "float64", (2,))])
    version = registry.register("m", "1", LinearRegression().fit(X, Y), signature=signature)
    assert version.example is None
    assert ms.Signature.from_json(version.signature) == signature


def test_a_path_is_registered_as_it_is(registry: ms.Registry, tmp_path: Path) -> None:
    """A saved file keeps its bytes: its digest in the registry is that of the file."""
    path = tmp_path / "forest.skops"
    skops.io.dump(RandomForestClassifier(2).fit(X, Y), path)
    for given in (path, str(path)):
        version = registry.register("m", f"from-{type(given).__name__}", given, example=X[:2])
        assert version.artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert version.load_options["trusted"] == ["sklearn.tree._tree.Tree"]


def test_a_pickle_from_elsewhere_is_not_opened(registry: ms.Registry, tmp_path: Path) -> None:
    """Registering a pickle by its path stores it, but runs none of it; its golden example has no answers."""
    path = tmp_path / "model.joblib"
    joblib.dump(Tripwire(tmp_path / "trace"), path)
    version = registry.register("m", "1", path, example=X[:2])
    assert version.artifact.format == "joblib"
    assert not (tmp_path / "trace").exists()
    (tmp_path / "model.skops").write_bytes(pickle.dumps(Tripwire(tmp_path / "trace")))
    with pytest.raises(ms.ArtifactUnsafe):
        registry.register("m", "2", tmp_path / "model.skops", example=X[:2])
    assert not (tmp_path / "trace").exists()


def _refused(registry: ms.Registry, match: str, *args: Any, **options: Any) -> None:
    with pytest.raises(ms.InvalidInput, match=match):
        registry.register(*args, **options)
    assert registry.models() == []


def test_what_cannot_be_served_is_refused_before_it_has_a_row(registry: ms.Registry, tmp_path: Path) -> None:
    """Each refusal names the argument and the fix, and leaves the registry as it was."""
    model = LinearRegression().fit(X, Y)
    _refused(registry, "example: give a few rows", "m", "1", model)
    _refused(registry, "model_name", "batch", "1", model, example=X)
    _refused(registry, "model_name", "../etc", "1", model, example=X)
    _refused(registry, "version", "m", "1/2", model, example=X)
    _refused(registry, "example: the model does not answer it", "m", "1", model, example=X[:, :1])
    _refused(registry, "has no method 'predict_proba'", "m", "1", model, example=X, method="predict_proba")
    _refused(registry, "pass framework=", "m", "1", object(), example=X)
    _refused(registry, "there is nothing at", "m", "1", tmp_path / "absent.skops", example=X)
    _refused(registry, "no format 'onnx'", "m", "1", model, example=X, format="onnx")
    _refused(registry, "metrics", "m", "1", model, example=X, metrics={"auc": object()})


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: np.zeros(len(x) + 1),
        lambda x: np.array(["2020-01-01"] * len(x), dtype="datetime64[D]"),
        lambda x: np.array([object()] * len(x)),
        lambda x: 1 / 0,
    ],
    ids=["too many rows", "dates", "objects", "raises"],
)
def test_a_model_whose_answers_cannot_be_served_is_refused(registry: ms.Registry, answer: Any) -> None:
    """Answers that no response could carry are found at registration, not by the first user."""
    with pytest.raises(ms.InvalidInput, match=r"example: the model('s answer has no JSON form| does not answer it)"):
        registry.register("m", "1", Constant(_Named(answer)), example=X, format="joblib")


class _Named:
    """A function that pickles, whatever it holds, by carrying a number of the table below."""

    table: list[Any] = []  # noqa: RUF012

    def __init__(self, function: Any) -> None:
        self.table.append(function)
        self.index = len(self.table) - 1

    def __call__(self, x: Any) -> Any:
        return self.table[self.index](x)


def test_a_model_that_changes_when_saved_is_refused(registry: ms.Registry) -> None:
    """The saved model must answer the example as the live one does."""
    with pytest.raises(ms.InvalidInput, match="answers the example differently"):
        registry.register("m", "1", Forgetful(), example=X, format="joblib")


def test_a_version_is_registered_once(registry: ms.Registry) -> None:
    """The second registration of a version is refused, whatever its bytes."""
    registry.register("m", "1", LinearRegression().fit(X, Y), example=X)
    with pytest.raises(ms.VersionExists):
        registry.register("m", "1", LogisticRegression().fit(X, Y), example=X)


def test_a_registry_without_a_place_for_artifacts_says_so() -> None:
    """A database that is no file has no folder beside it; the error says what to pass."""
    registry = ms.Registry("sqlite://")
    with pytest.raises(ms.ConfigError, match="artifacts="):
        registry.register("m", "1", LinearRegression().fit(X, Y), example=X)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"signature": "x"}, "signature"), ({"method": 3}, "method"), ({"example": [{"a": 1}, 3]}, "example")],
)
def test_an_option_of_another_type_is_named(registry: ms.Registry, options: dict[str, Any], field: str) -> None:
    """What could only be a mistake is refused before anything is saved."""
    with pytest.raises(ms.InvalidInput) as refused:
        registry.register("m", "1", LinearRegression().fit(X, X[:, 0]), **{"example": X, **options})
    assert refused.value.field == field


def test_a_folder_where_a_file_should_be_is_refused(registry: ms.Registry, tmp_path: Path) -> None:
    """A path that cannot be read as what its name says is named, with the reason."""
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ms.InvalidInput, match=r"model: .*model\.onnx cannot be read"):
        registry.register("m", "1", tmp_path / "model.onnx", example=X)


# -- signatures that no request can have -------------------------------------------------------------------


def test_a_signature_that_no_body_can_hold_is_refused(registry: ms.Registry) -> None:
    """What could never be asked over HTTP is refused with the limit's name, unless the limit is another, or none."""
    model, signature = LinearRegression().fit(X, Y), ms.Signature([ms.Field("x", "float64", (9_000_000,))])
    with pytest.raises(ms.InvalidInput, match=r"has at least 18000\d+ bytes .* at most 16777216 \(max_body_bytes\)"):
        registry.register("m", "1", model, signature=signature)
    registry.register("m", "1", model, signature=signature, max_body_bytes=20_000_000)
    registry.register("m", "2", model, signature=signature, max_body_bytes=None)
    with pytest.raises(ms.InvalidInput, match="at most 15 "):
        registry.register("m", "3", model, example=X[:2], max_body_bytes=15)
