"""Models from a real MLflow store: imported, promoted, served, and answering as they did there."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import modelserve as ms
from modelserve import plugins
from modelserve.adapters.registries.mlflow.examples import example_of
from modelserve.adapters.registries.mlflow.flavors import open_model
from modelserve.adapters.registries.mlflow.schema import signature_of
from modelserve.cli.commands import app
from modelserve.errors import ArtifactUnsafe, BackendUnavailable, InvalidInput, MissingDependency, VersionExists
from modelserve.signing import generate_keys, trusted_keys, verify
from tests.adapters.mlflow_store import QUIET, Store, server

ROWS = pd.DataFrame({"tenure": [1, 5, 40, 60], "spend": [0.5, 1.5, 2.5, 3.5]})
Served: TypeAlias = Callable[..., list[Any]]
X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")

pytestmark = pytest.mark.timeout(120)  # MLflow imports, migrates its database and saves slowly


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A tracking store in a SQLite file, with a few models."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in QUIET.items():
            patch.setenv(name, value)
        store = Store(f"sqlite:///{folder}/mlflow.db", folder)
        estimator = LogisticRegression().fit(ROWS, [1, 1, 0, 0])
        frame: dict[str, Any] = {"signature": _inferred(ROWS, estimator.predict(ROWS)), "input_example": ROWS}
        for form in ("skops", "cloudpickle"):
            store.log("sklearn", estimator, "churn", {"auc": 0.9}, serialization_format=form, **frame)
        store.alias("churn", "champion", "1")
        store.alias("churn", "pickled", "2")
        store.log("onnx", _graph(), "graph", signature=_inferred(X, X), input_example=X[:2])
        yield store


@pytest.fixture
def registry(tmp_path: Path) -> ms.Registry:
    """An empty registry of ours."""
    return ms.Registry(f"sqlite:///{tmp_path}/models.db")


def _inferred(inputs: Any, outputs: Any) -> Any:
    from mlflow.models import infer_signature  # noqa: PLC0415  # seconds, for those tests alone that need it

    return infer_signature(inputs, outputs)


def _graph() -> Any:
    """Return a graph with weights large enough for MLflow to put them into a file beside it."""
    weights = np.random.default_rng(1).normal(size=(3, 400)).astype("float32")
    x = helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, 3])
    y = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 400])
    node = helper.make_node("MatMul", ["features", "w"], ["scores"])
    graph = helper.make_graph([node], "matmul", [x], [y], [onnx.numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def served(registry: ms.Registry, tmp_path: Path) -> Served:
    """Promote a version and have a server answer rows with it."""

    def served(version: ms.ModelVersion, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
        registry.promote(version.model_name, version.version)
        models = {version.model_name: ms.ModelOptions(**options)}
        with ms.ModelServer(registry, models, cache_dir=tmp_path / "cache") as server:
            return [each.prediction for each in server.predict_many(version.model_name, rows)]

    return served


# -- from end to end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["models:/churn@champion", "models:/churn/1", "models:/churn@pickled"])
def test_an_estimator_answers_as_it_did_in_mlflow(
    store: Store, registry: ms.Registry, served: Served, uri: str
) -> None:
    """Its alias is resolved, its files are copied, and its metrics and origin come along; a pickle is made safe."""
    imported = ms.import_model(registry, "mlflow", uri, source_url=store.uri, allow_pickle="pickled" in uri)

    number = "2" if "pickled" in uri else "1"
    assert (imported.model_name, imported.version, imported.status) == ("churn", number, "staging")
    assert (imported.framework, imported.artifact.format) == ("sklearn", "skops")
    assert imported.metrics == {"auc": 0.9}
    assert imported.tags["mlflow.source"] == f"models:/churn/{number}"
    assert imported.tags["mlflow.model_version"] == number
    assert store.client.get_run(imported.tags["mlflow.run_id"]).data.metrics == {"auc": 0.9}
    assert ms.Signature.from_json(imported.signature).inputs == (
        ms.Field("tenure", "int64"),
        ms.Field("spend", "float64"),
    )
    assert imported.example is not None
    assert registry.history("churn")[0].reason == f"imported from models:/churn/{number}"
    answers = served(imported, ROWS.to_dict("records"))
    assert answers == store.pyfunc(uri).predict(ROWS).tolist()


def test_a_graph_answers_as_it_did_in_mlflow(store: Store, registry: ms.Registry, served: Served) -> None:
    """The weights that MLflow keeps in a file beside the graph become part of it."""
    imported = ms.import_model(registry, "mlflow", "models:/graph/1", source_url=store.uri, name="ours", version="7")
    assert (imported.model_name, imported.version, imported.framework) == ("ours", "7", "onnx")
    assert imported.artifact.size > 3 * 400 * 4
    answers = served(imported, [{"x": row.tolist()} for row in X])
    (expected,) = store.pyfunc("models:/graph/1").predict(X).values()
    np.testing.assert_allclose(answers, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_model_is_imported_over_http(
    registry: ms.Registry, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a tracking server, alias, run and files come over HTTP, whatever MLflow's own configuration says."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    estimator = LogisticRegression().fit(ROWS, [1, 1, 0, 0])
    with server(tmp_path) as remote, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"signature": _inferred(ROWS, estimator.predict(ROWS)), "serialization_format": "skops"}
        remote.log("sklearn", estimator, "churn", {"auc": 0.9}, **options)
        remote.alias("churn", "champion", "1")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
        imported = ms.import_model(registry, "mlflow", "models:/churn@champion", source_url=remote.uri)
        assert imported.metrics == {"auc": 0.9}
        answers = served(imported, ROWS.to_dict("records"))
        assert answers == remote.pyfunc("models:/churn@champion").predict(ROWS).tolist()
    assert list((tmp_path / "files").rglob("MLmodel"))
    assert not (tmp_path / "elsewhere.db").exists()


def test_an_imported_version_can_be_signed_and_asked_for_probabilities(
    store: Store, registry: ms.Registry, served: Served
) -> None:
    """What ``register`` takes, an import takes as well."""
    pair = generate_keys()
    imported = ms.import_model(
        registry,
        "mlflow",
        "models:/churn/1",
        source_url=store.uri,
        method="predict_proba",
        example=ROWS[:1],
        signing_key=pair.private,
    )
    verify(trusted_keys([pair.public]), imported)
    (answer,) = served(imported, ROWS[:1].to_dict("records"))
    assert sum(answer) == pytest.approx(1)


def test_serving_never_talks_to_mlflow(store: Store, registry: ms.Registry, served: Served) -> None:
    """Once it is imported, a model is served where MLflow is not even installed."""
    imported = ms.import_model(registry, "mlflow", "models:/churn/1", source_url=store.uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        assert len(served(imported, ROWS.to_dict("records"))) == len(ROWS)


def test_the_command_line_imports(
    store: Store, registry: ms.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``modelserve import mlflow`` takes the same options, and tells a refusal in a line after what MLflow logs."""
    monkeypatch.chdir(tmp_path)
    command = ["import", "mlflow", "models:/churn@pickled", "--tracking-uri", store.uri, "--name", "ours"]
    refused = CliRunner().invoke(app, command, catch_exceptions=False)
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1].startswith("error: model.pkl is a pickle")
    done = CliRunner().invoke(app, [*command, "--version", "7", "--allow-pickle"], catch_exceptions=False)
    assert done.stdout == "ours 7 is registered, in staging\ninputs: tenure int64, spend float64\n"
    assert registry.get("ours", "7").artifact.format == "skops"


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_version_is_imported_once(store: Store, registry: ms.Registry) -> None:
    """A second import of the same version is refused before anything is downloaded; under another name it is not."""
    ms.import_model(registry, "mlflow", "models:/churn/1", source_url=store.uri)
    with pytest.raises(VersionExists):
        ms.import_model(registry, "mlflow", "models:/churn@champion", source_url=store.uri)
    ms.import_model(registry, "mlflow", "models:/churn@champion", source_url=store.uri, version="1-again")


def test_a_pickle_is_not_opened_unless_allowed(store: Store, registry: ms.Registry) -> None:
    """The error says how to allow it, and no version appears."""
    with pytest.raises(ArtifactUnsafe, match=r"model.pkl is a pickle.*--allow-pickle"):
        ms.import_model(registry, "mlflow", "models:/churn@pickled", source_url=store.uri)
    assert registry.models() == []


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("models:/nope/1", "MLflow does not know models:/nope/1"),
        ("models:/churn/99", "MLflow does not know models:/churn/99"),
        ("models:/churn@nobody", "MLflow does not know models:/churn@nobody"),
        ("models:/churn/latest", "write models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/churn/1/../2", "write models:/NAME/VERSION"),
        ("runs:/abc/model", "write models:/NAME/VERSION"),
        ("file:///etc/passwd", "write models:/NAME/VERSION"),
    ],
)
def test_what_mlflow_does_not_know_is_named(store: Store, registry: ms.Registry, uri: str, problem: str) -> None:
    """A URI that names no version, or none that is there, is the caller's mistake."""
    with pytest.raises(InvalidInput, match=problem) as refused:
        ms.import_model(registry, "mlflow", uri, source_url=store.uri)
    assert refused.value.field == "uri"


def test_a_tracking_server_that_is_down_is_told_without_its_address(
    registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address may hold a password: it stays in the cause."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendUnavailable, match="MLflow is unavailable") as refused:
        ms.import_model(registry, "mlflow", "models:/churn/1", source_url="http://ann:secret@127.0.0.1:9")
    assert "secret" not in str(refused.value)
    assert refused.value.retryable


def test_an_unknown_source_and_a_missing_driver_are_told(
    registry: ms.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kinds of registries that models can be taken from are listed; without its package one says how to get it."""
    with pytest.raises(InvalidInput, match="known: mlflow"):
        ms.import_model(registry, "sagemaker", "x")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingDependency, match=r"pip install 'modelserve\[mlflow\]'"):
        plugins.source("mlflow")


# -- flavours ----------------------------------------------------------------------------------------------


def test_an_unknown_flavour_lists_those_that_work(tmp_path: Path) -> None:
    """A model of Python code alone has no form that can be served."""
    flavors = {"python_function": {"loader_module": "mlflow.pyfunc.model"}, "spark": {}}
    with pytest.raises(InvalidInput, match=r"\(python_function, spark\); these can: sklearn, onnx, xgboost"):
        open_model(tmp_path, {"flavors": flavors}, allow_pickle=True)


@pytest.mark.parametrize("name", ["../secret.pkl", "/etc/passwd", "missing.pkl"])
def test_a_description_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    """Names in MLmodel come from whoever logged the model."""
    root = (tmp_path / "model").resolve()
    root.mkdir()
    (tmp_path / "secret.pkl").write_bytes(b"")
    with pytest.raises(InvalidInput, match="which it does not hold"):
        open_model(root, {"flavors": {"sklearn": {"pickled_model": name}}}, allow_pickle=True)


@pytest.mark.parametrize(
    ("flavor", "problem"),
    [
        ({"xgboost": {"data": "model", "model_class": "xgboost.core.Booster"}}, "log the estimator"),
        ({"xgboost": {"data": "model", "model_class": "xgboost.sklearn.os"}}, "has no estimator 'os'"),
        ({"xgboost": {"data": "model", "model_class": "xgboost.sklearn.XGBClassifier"}}, "XGBoost cannot read"),
        ({"lightgbm": {"data": "model", "model_class": "lightgbm.basic.Booster"}}, "log the estimator"),
        ({"onnx": {"data": "model"}}, "no ONNX model that can be read"),
        ({"sklearn": {"pickled_model": "model"}}, "cannot be opened here: UnpicklingError"),
    ],
)
def test_what_cannot_be_opened_is_told(tmp_path: Path, flavor: dict[str, Any], problem: str) -> None:
    """A file that is not what its description says, or that says too little, is refused in words."""
    (tmp_path / "model").write_bytes(b"nonsense")
    with pytest.raises(InvalidInput, match=problem):
        open_model(tmp_path.resolve(), {"flavors": flavor}, allow_pickle=True)


def test_keras_and_saved_models_are_handed_on_unopened(tmp_path: Path) -> None:
    """They hold programs: they are registered as files, and opened by servers that allow it."""
    root = tmp_path.resolve()
    (root / "data").mkdir()
    (root / "data" / "model.keras").write_bytes(b"nonsense")
    (root / "saved").mkdir()
    for flavors, path, form in (
        ({"keras": {"data": "data"}}, root / "data" / "model.keras", "keras"),
        ({"tensorflow": {"data": "data", "model_type": "keras"}}, root / "data" / "model.keras", "keras"),
        ({"tensorflow": {"saved_model_dir": "saved"}}, root / "saved", "saved_model"),
    ):
        opened = open_model(root, {"flavors": flavors}, allow_pickle=False)
        assert (opened.model, opened.framework, opened.format) == (path, "tensorflow", form)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["xgboost", "lightgbm", "pytorch", "pytorch pickle", "tensorflow"])
def test_other_flavours_answer_as_they_did_in_mlflow(
    store: Store, registry: ms.Registry, served: Served, case: str
) -> None:
    """Boosters go through their estimators, networks as the programs that they were exported to."""
    model, options, allowed = _OTHERS[case]()
    flavor, name = case.partition(" ")[0], case.replace(" ", "-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frameworks warn of each other while they save
        store.log(flavor, model, name, signature=_inferred(X, X[:, 0]), input_example=X[:2], **options)
        imported = ms.import_model(
            registry, "mlflow", f"models:/{name}/1", source_url=store.uri, allow_pickle="pickle" in str(options)
        )
        answers = served(imported, [{"x": row.tolist()} for row in X], timeout_ms=20_000, **allowed)
        expected = np.asarray(store.pyfunc(f"models:/{name}/1").predict(X))
    np.testing.assert_allclose(np.asarray(answers).reshape(len(X), -1), expected.reshape(len(X), -1), rtol=1e-4)


def _xgboost() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from xgboost import XGBRegressor  # noqa: PLC0415  # each case imports what it is about

    return XGBRegressor(n_estimators=3).fit(X, X[:, 0]), {}, {}


def _lightgbm() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from lightgbm import LGBMRegressor  # noqa: PLC0415  # as above

    model = LGBMRegressor(n_estimators=3, min_child_samples=1, verbose=-1).fit(X, X[:, 0])
    return model, {"serialization_format": "cloudpickle"}, {}


def _pytorch() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from torch import nn  # noqa: PLC0415  # as above

    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), {}, {}


def _pytorch_pickle() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    return _pytorch()[0], {"serialization_format": "pickle"}, {}


def _tensorflow() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    import keras  # noqa: PLC0415  # as above

    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), {}, {"allow_code": True}


_OTHERS = {
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
    "pytorch": _pytorch,
    "pytorch pickle": _pytorch_pickle,
    "tensorflow": _tensorflow,
}


# -- inputs and examples -----------------------------------------------------------------------------------


def _signature(*columns: dict[str, Any]) -> ms.Signature | None:
    return signature_of({"signature": {"inputs": json.dumps(columns)}})


def _tensor(dtype: str, *shape: int, **named: Any) -> dict[str, Any]:
    return {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}} | named


def test_columns_are_inputs_of_the_same_name_and_width() -> None:
    """Each type of a column has its dtype; an optional one may be null where the dtype has a null."""
    kinds = {"boolean": "bool", "integer": "int32", "long": "int64", "float": "float32", "double": "float64"}
    columns = [{"name": kind, "type": kind, "required": False} for kind in [*kinds, "string"]]
    fields = [ms.Field(kind, dtype, nullable="float" in dtype) for kind, dtype in kinds.items()]
    assert _signature(*columns) == ms.Signature([*fields, ms.Field("string", "string", nullable=True)])
    assert _signature({"name": "a", "type": "double", "required": True}) == ms.Signature([ms.Field("a", "float64")])


def test_tensors_are_inputs_of_one_row() -> None:
    """The first dimension is the batch; a tensor without a name is called x; columns without names are a row."""
    assert _signature(_tensor("float32", -1, 3, 2)) == ms.Signature([ms.Field("x", "float32", (3, 2))])
    named = (_tensor("int64", -1, name="ids"), _tensor("object", -1, 2, name="words"))
    assert _signature(*named) == ms.Signature([ms.Field("ids", "int64"), ms.Field("words", "string", (2,))])
    assert _signature({"type": "double"}, {"type": "double"}) == ms.Signature([ms.Field("x", "float64", (2,))])
    assert signature_of({}) is None
    assert signature_of({"signature": {"inputs": None}}) is None


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ([{"name": "when", "type": "datetime"}], "when: MLflow's type 'datetime'"),
        ([{"name": "image", "type": "binary"}], "image: MLflow's type 'binary'"),
        ([{"name": "tags", "type": "array", "items": {"type": "string"}}], "tags: MLflow's type 'array'"),
        ([{"name": "odd", "type": ["long"]}], "odd: MLflow's type"),
        ([_tensor("float32", 8, 3)], "x: its first dimension is 8"),
        ([_tensor("float32", -1, -1)], "x: its shape .* is open"),
        ([_tensor("datetime64[ns]", -1)], "x: a tensor of datetime64"),
        ([{"name": "t", "type": "tensor"}], "t: MLflow's type of this tensor cannot be read"),
        ([{"type": "double"}, {"type": "string"}], "columns of several types need names"),
        ([{"type": "double"}, {"type": "double", "name": "b"}], "some columns have a name"),
        ([1], "signature: MLflow's signature"),
    ],
)
def test_a_column_that_no_request_can_carry_is_named(columns: list[Any], problem: str) -> None:
    """The error says which column it is."""
    with pytest.raises(InvalidInput, match=problem):
        _signature(*columns)


@pytest.mark.parametrize(
    ("kind", "document", "expected"),
    [
        ("dataframe", {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}, {"a": [1, 2], "b": ["x", "y"]}),
        ("dataframe", [[1, 2]], {"x": [[1, 2]]}),
        ("ndarray", {"inputs": [[1.0, 2.0]]}, {"x": [[1.0, 2.0]]}),
        ("ndarray", [[1.0, 2.0]], {"x": [[1.0, 2.0]]}),
        ("dataframe", {"columns": ["a", "b"], "data": [[1]]}, None),
        ("ndarray", {"inputs": {"a": [1], "b": [2]}}, {"a": [1], "b": [2]}),
        ("json_object", [{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 2}]),
        ("json_object", "a prompt", None),
        ("sparse_matrix_csr", {"data": []}, None),
    ],
)
def test_an_example_becomes_rows(tmp_path: Path, kind: str, document: Any, expected: Any) -> None:
    """What is a table or an array is used; anything else is left out."""
    (tmp_path / "input_example.json").write_text(json.dumps(document))
    info = {"saved_input_example_info": {"artifact_path": "input_example.json", "type": kind}}
    assert example_of(tmp_path.resolve(), info, None) == expected


def test_an_example_that_is_broken_or_elsewhere_is_not_read(tmp_path: Path) -> None:
    """It is left out; what lies outside the model's folder is no example of it."""
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "model").mkdir()
    outside = {"saved_input_example_info": {"artifact_path": "../broken.json", "type": "dataframe"}}
    assert example_of((tmp_path / "model").resolve(), outside, None) is None
    assert example_of(tmp_path, {}, None) is None
    broken = {"saved_input_example_info": {"artifact_path": "broken.json", "type": "dataframe"}}
    assert example_of(tmp_path.resolve(), broken, None) is None


@pytest.mark.parametrize("text", [None, "flavors: [", "flavors: 3", "just text"])
def test_a_folder_that_holds_no_model_is_told(tmp_path: Path, text: str | None) -> None:
    """Whatever is wrong with its MLmodel, the error is one of ours."""
    from modelserve.adapters.registries.mlflow.source import _description  # noqa: PLC0415  # white box, for this test

    if text is not None:
        (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(InvalidInput, match="MLmodel"):
        _description(tmp_path)
    (tmp_path / "MLmodel").write_text("flavors:\n  onnx: {}\n")
    assert _description(tmp_path)["flavors"] == {"onnx": {}}
