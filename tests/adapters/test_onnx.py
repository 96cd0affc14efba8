"""The ONNX adapter: the contract on graphs of every kind of input, what it refuses, and a real model end to end."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

import magika
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from examples import file_types
from modelserve.adapters.frameworks.onnx import OnnxFramework
from modelserve.adapters.frameworks.onnx.feeds import bind
from modelserve.adapters.frameworks.onnx.graph import Input, inputs_of
from modelserve.config import ModelOptions
from modelserve.errors import ArtifactUnsafe, InferenceFailed, InvalidInput, LoadError, LoadFailed, ModelServeError
from modelserve.ports import Framework
from modelserve.registry import Registry
from modelserve.server import AsyncModelServer
from modelserve.signature import Field, Signature
from modelserve.testing.frameworks import Case, FrameworkContract
from modelserve.types import Runtime

FRAMEWORK = OnnxFramework()
FILE_TYPES = file_types.model_folder() / "model.onnx"
RANDOM = np.random.default_rng(0)
FLOAT, DOUBLE, INT64, STRING, BOOL = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.STRING,
    TensorProto.BOOL,
)


def _value(name: str, kind: int, *shape: int | None) -> Any:
    return helper.make_tensor_value_info(name, kind, [None, *shape])


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any] | None = None) -> Any:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


WEIGHTS = RANDOM.normal(size=(3, 2)).astype("float32")
LINEAR = _model(
    [helper.make_node("MatMul", ["x", "w"], ["y"])], [_value("x", FLOAT, 3)], [_value("y", FLOAT, 2)], {"w": WEIGHTS}
)
CONVOLUTION = _model(
    [helper.make_node("Conv", ["image", "w"], ["y"])],
    [_value("image", FLOAT, 3, 8, 8)],
    [_value("y", FLOAT, 2, 6, 6)],
    {"w": RANDOM.normal(size=(2, 3, 3, 3)).astype("float32")},
)
UPPER = _model(
    [
        helper.make_node("StringConcat", ["text", "mark"], ["marked"]),
        helper.make_node("Reshape", ["marked", "flat"], ["y"]),
    ],
    [_value("text", STRING, 1)],
    [_value("y", STRING)],
    {"mark": np.array(["!"], dtype=object), "flat": np.array([-1])},
)
CODES = _model(
    [helper.make_node("LabelEncoder", ["plan"], ["y"], "ai.onnx.ml", domain="ai.onnx.ml",
                      keys_strings=["free", "ünï"], values_int64s=[1, 2], default_int64=-1)],
    [_value("plan", STRING)],
    [_value("y", INT64)],
)  # fmt: skip
SEVERAL = _model(
    [
        helper.make_node("Cast", ["count"], ["counted"], to=DOUBLE),
        helper.make_node("Where", ["active", "counted", "spend"], ["chosen"]),
        helper.make_node("Not", ["active"], ["idle"]),
    ],
    [_value("count", INT64, 1), _value("active", BOOL, 1), _value("spend", DOUBLE, 1)],
    [_value("chosen", DOUBLE, 1), _value("idle", BOOL, 1)],
)
HALVES = _model(
    [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)],
    [_value("x", FLOAT, 3)],
    [_value("y", TensorProto.FLOAT16, 3)],
)
MAPS = _model(
    [helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[5, 6, 7])],
    [_value("x", FLOAT, 3)],
    [helper.make_value_info(
        "y",
        helper.make_sequence_type_proto(helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))),
    )],
)  # fmt: skip

ROWS = RANDOM.normal(size=(64, 3)).astype("float32")
TEXTS = np.array([f"{word} {i}" for i, word in enumerate(["good", "bad", "ünïcode", ""] * 16)])
PLANS = {"plan": np.array(["free", "ünï", "other", ""] * 16)}
TABLE = {
    "spend": RANDOM.normal(size=64),
    "count": np.arange(64),
    "active": RANDOM.random(64) > 0.5,
}
FILES = {"bytes": np.stack([file_types.features(bytes(RANDOM.integers(0, 256, 3000, "uint8"))) for _ in range(64)])}


def _run(model: Any, feeds: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, feeds)
    return results


def _of_rows(name: str = "x") -> Any:
    return lambda model, rows: _run(model, {name: rows})[0]


def _of_matrix(model: Any, columns: Any) -> Any:
    return _run(model, {"x": np.column_stack(list(columns.values()))})[0]


def _of_texts(model: Any, texts: Any) -> Any:
    return _run(model, {"text": texts.astype(object)[:, None]})[0]


def _of_plans(model: Any, columns: Any) -> Any:
    return _run(model, {"plan": columns["plan"].astype(object)})[0]


def _of_table(model: Any, columns: Any) -> Any:
    chosen, idle = _run(model, {name: column[:, None] for name, column in columns.items()})
    return {"chosen": chosen, "idle": idle}


def _of_maps(model: Any, rows: Any) -> Any:
    answer = [{str(label): score for label, score in row.items()} for row in _run(model, {"x": rows})[0]]
    return np.array(answer, dtype=object)


CASES = [
    Case("matrix", LINEAR, ROWS, _of_rows(), tolerance=1e-6),
    Case(
        "columns side by side", LINEAR, {name: ROWS[:, i] for i, name in enumerate("bca")}, _of_matrix, tolerance=1e-6
    ),
    Case("tensor", CONVOLUTION, RANDOM.normal(size=(64, 3, 8, 8)).astype("float32"), _of_rows("image"), tolerance=1e-5),
    Case("strings", UPPER, TEXTS, _of_texts),
    Case("strings by name", CODES, PLANS, _of_plans),
    Case("numbers and booleans by name, two outputs", SEVERAL, TABLE, _of_table),
    Case("half precision out", HALVES, ROWS, _of_rows()),
    Case("maps out", MAPS, ROWS, _of_maps),
    Case("file types", onnx.load(FILE_TYPES), FILES, lambda model, rows: _run(model, rows)[0], tolerance=1e-6),
]


class TestOnnx(FrameworkContract):
    @pytest.fixture
    def framework(self) -> Framework:
        return OnnxFramework()

    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param  # type: ignore[no-any-return]


# -- what a graph takes and what it does not ---------------------------------------------------------------


def _save(model: Any, folder: Path, example: Any = None, **options: Any) -> Any:
    return FRAMEWORK.save(model, folder, options, example)


@pytest.mark.parametrize(
    ("model", "example", "field", "words"),
    [
        (LINEAR, {"x": ROWS.astype("float64")}, "x", r'takes float32 here, got float64; .*astype\("float32"\)'),
        (LINEAR, {"a": ROWS[:, 0], "b": ROWS[:, 1].astype("int64"), "c": ROWS[:, 2]}, "b", "got int64"),
        (LINEAR, {"a": ROWS[:, 0], "b": ROWS[:, 1]}, "x", "takes 3 columns, got 2: a, b"),
        (LINEAR, {"a": ROWS, "b": ROWS}, "x", "missing: the graph takes x"),
        (LINEAR, {"x": ROWS[:, :2]}, "x", "takes rows of 3 here, got 2"),
        (CONVOLUTION, {"x": ROWS}, "x", "takes rows of 3×8×8 here, got 3"),
        (SEVERAL, {"count": TABLE["count"], "spend": TABLE["spend"]}, "active", "missing"),
        (SEVERAL, TABLE | {"more": TABLE["spend"]}, "more", "no such input; it takes count, active, spend"),
        (UPPER, {"text": np.array(["a", None], dtype=object)}, "text", "no missing strings"),
    ],
)
def test_an_example_that_does_not_fit_the_graph_is_refused(
    model: Any, example: dict[str, Any], field: str, words: str, tmp_path: Path
) -> None:
    """Registration names the input that the graph does not take like this, and says the fix."""
    with pytest.raises(InvalidInput, match=words) as refused:
        _save(model, tmp_path, example)
    assert refused.value.field == field


def test_a_graph_for_a_fixed_number_of_rows_is_refused(tmp_path: Path) -> None:
    """A batch of one that was exported as such cannot be served in batches; the error says how to export."""
    x = helper.make_tensor_value_info("x", FLOAT, [1, 3])
    fixed = _model([helper.make_node("Neg", ["x"], ["y"])], [x], [_value("y", FLOAT, 3)])
    with pytest.raises(InvalidInput, match="x: the graph takes exactly 1 rows; export it with a dynamic batch axis"):
        _save(fixed, tmp_path)


def _takes(value: Any) -> Any:
    return _model([helper.make_node("Identity", ["x"], ["y"])], [value], [_value("y", FLOAT)])


def _gives(kind: Any) -> Any:
    return _model([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)], [_value("x", FLOAT)], [kind])


FLOATS = helper.make_tensor_type_proto(FLOAT, [None])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_takes(helper.make_tensor_value_info("x", FLOAT, [])), "x: the graph takes a single value here"),
        (_takes(helper.make_value_info("x", helper.make_sequence_type_proto(FLOATS))), "only tensors can be served"),
        (_takes(_value("x", TensorProto.BFLOAT16)), "bfloat16 here, which no request can carry"),
        (_gives(_value("y", TensorProto.BFLOAT16)), "'y' is bfloat16, which no answer can carry; cast it to float32"),
        (_gives(helper.make_value_info("y", helper.make_sequence_type_proto(FLOATS))), "'y' is sequence"),
        (_model([helper.make_node("Neg", ["z"], ["y"])], [_value("x", FLOAT)], [_value("y", FLOAT)]), "breaks a rule"),
        (object(), "expected an onnx.ModelProto"),
    ],
)
def test_a_graph_that_cannot_be_served_is_refused(model: Any, words: str, tmp_path: Path) -> None:
    """What has no form in a request or an answer, or is no valid graph, is refused at registration in words."""
    with pytest.raises(InvalidInput, match=words):
        _save(model, tmp_path)


@pytest.mark.parametrize("options", [{"method": "predict_proba"}, {"format": "ort"}, {"factory": "nets:make"}], ids=str)
def test_an_option_that_means_nothing_to_a_graph_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    """A graph has no methods, no second format and no factory."""
    with pytest.raises(InvalidInput) as refused:
        _save(LINEAR, tmp_path, **options)
    assert [refused.value.field] == list(options)


def test_an_input_with_a_value_of_its_own_need_not_be_given(tmp_path: Path) -> None:
    """Old files list their weights among the inputs; only the others are asked for."""
    listed = onnx.ModelProto.FromString(LINEAR.SerializeToString())
    listed.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [3, 2]))
    saved = _save(listed, tmp_path, {"anything": ROWS})
    found = FRAMEWORK.load(saved.path, saved.format, {}).infer({"anything": ROWS})
    assert np.allclose(found["output"], ROWS @ WEIGHTS, atol=1e-6)


def test_what_fails_while_it_runs_is_an_inference_error(tmp_path: Path) -> None:
    """An error of ONNX Runtime becomes InferenceFailed with its first line, and the model stays usable."""
    divided = _model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [_value("x", INT64)],
        [_value("y", INT64)],
        {"table": np.array([10, 20])},
    )
    saved = _save(divided, tmp_path)
    model = FRAMEWORK.load(saved.path, saved.format, {})
    with pytest.raises(InferenceFailed, match=r"ONNX Runtime failed: .*out of data bounds"):
        model.infer({"x": np.array([7])})
    assert model.infer({"x": np.array([1])})["output"].tolist() == [20]


# -- files that mean no good -------------------------------------------------------------------------------


class Mischief:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def _refused(path: Path, folder: Path) -> list[str]:
    """Return what registration by path and loading say to a file."""
    words = []
    with pytest.raises(ModelServeError) as at_save:
        _save(path, folder)
    words.append(str(at_save.value))
    with pytest.raises(LoadError) as at_load:
        FRAMEWORK.load(path, "onnx", {})
    return [*words, str(at_load.value)]


def test_a_renamed_pickle_is_not_opened(tmp_path: Path) -> None:
    """A pickle that calls itself ONNX is refused at registration and at load, and nothing of it runs."""
    fake = tmp_path / "model.onnx"
    fake.write_bytes(pickle.dumps(Mischief(tmp_path / "ran")))
    assert all("not an ONNX model" in words for words in _refused(fake, tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    """A file that was cut short is a LoadError, not a crash."""
    cut = tmp_path / "model.onnx"
    data = FILE_TYPES.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    assert all("not an ONNX model" in words for words in _refused(cut, tmp_path))


def _reading(location: str, *, hidden: bool) -> Any:
    """Make a graph that adds four numbers out of another file, in plain sight or inside the branch of an ``If``."""
    tensor = TensorProto(name="stolen", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    if not hidden:
        model = _model(
            [helper.make_node("Add", ["x", "stolen"], ["y"])], [_value("x", FLOAT, 4)], [_value("y", FLOAT, 4)]
        )
        model.graph.initializer.append(tensor)
        return model
    node = helper.make_node("Constant", [], ["inner"], value=tensor)
    branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("inner", FLOAT, [4])])
    choice = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    return _model(
        [choice, helper.make_node("Add", ["x", "chosen"], ["y"])],
        [_value("x", FLOAT, 4)],
        [_value("y", FLOAT, 4)],
        {"yes": np.array([True])},
    )


@pytest.mark.parametrize("hidden", [False, True], ids=["in sight", "in a branch"])
@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin", "{folder}/secret.bin"])
def test_numbers_in_other_files_are_never_read(
    location: str,
    hidden: bool,  # noqa: FBT001  # a parameter of the test, by name
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph that points at another file, beside it, above it or anywhere, is refused before that file is opened."""
    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype="float32").tobytes())
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside" if location.startswith("..") else tmp_path)
    path = Path.cwd() / "model.onnx"
    model = _reading(location.format(folder=tmp_path), hidden=hidden)
    path.write_bytes(model.SerializeToString())
    assert all("reads 'stolen' from another file, which is never done" in words for words in _refused(path, tmp_path))
    for attempt in (FRAMEWORK.wrap, lambda live, _: _save(live, tmp_path)):
        with pytest.raises(ArtifactUnsafe, match="never done"):
            attempt(model, {})


def test_an_operator_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    """A custom operator would need a library; none is ever loaded, and the graph is refused in words."""
    unknown = _model([helper.make_node("Run", ["x"], ["y"], domain="acme")], [_value("x", FLOAT)], [_value("y", FLOAT)])
    saved = _save(unknown, tmp_path)
    with pytest.raises(LoadFailed, match=r"acme:Run.* is not a registered function"):
        FRAMEWORK.load(saved.path, saved.format, {})


# -- where it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (Runtime(device="cuda:1"), "install onnxruntime-gpu"),
        (Runtime(device="mps"), "run on 'cpu' and 'cuda', not on 'mps'"),
        (Runtime(compile=True), r"leave out ModelOptions\(compile=True\)"),
    ],
    ids=str,
)
def test_a_place_that_is_not_there_is_refused(runtime: Runtime, words: str, tmp_path: Path) -> None:
    """A graph is not quietly run elsewhere than where it was asked to be."""
    saved = _save(LINEAR, tmp_path)
    with pytest.raises(LoadFailed, match=words):
        FRAMEWORK.load(saved.path, saved.format, {}, runtime)


@pytest.mark.parametrize(("threads", "expected"), [(None, 0), (3, 3)])
def test_a_session_keeps_to_its_threads(threads: int | None, expected: int, tmp_path: Path) -> None:
    """The number of threads is what the options say, and threads that wait do not spin."""
    saved = _save(LINEAR, tmp_path)
    model = FRAMEWORK.load(saved.path, saved.format, {}, Runtime(threads=threads))
    options = model._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (expected, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert model._session.get_providers() == ["CPUExecutionProvider"]


# -- a real model ------------------------------------------------------------------------------------------


def _contents() -> dict[str, bytes]:
    """Return real contents of several types, short and long, with white space around them."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("notes.txt", "words " * 500)
    here = Path(__file__)
    return {
        "source": here.read_bytes(),
        "short source": b"\n\n  import os\n\ndef main():\n    return os.getcwd()\n\n",
        "json": b'{"rows": [' + b",".join(b'{"id": %d, "ok": true}' % i for i in range(200)) + b"]}",
        "picture": (here.parents[2] / "docs" / "images" / "overload.svg").read_bytes(),
        "archive": archive.getvalue(),
        "model": FILE_TYPES.read_bytes(),
        "page": (here.parents[2] / "README.md").read_bytes(),
        "pickle": pickle.dumps(list(range(1000))),
    }


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_the_types_of_real_files_are_told(executor: Literal["thread", "process"], tmp_path: Path) -> None:
    """The model of magika, registered by its path, tells the same types and scores as magika itself."""
    contents, names = _contents(), file_types.labels()
    own = magika.Magika()
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        file_types.register(registry)
        options = {file_types.MODEL: ModelOptions(executor=executor, timeout_ms=30_000)}
        async with AsyncModelServer(registry, options, cache_dir=tmp_path / "cache") as server:
            requests = [file_types.request_of(content) for content in contents.values()]
            answers = await server.predict_many(file_types.MODEL, requests)
    for content, answer in zip(contents.values(), answers, strict=True):
        label, score = file_types.best(answer.prediction, names)
        expected = own.identify_bytes(content).prediction
        assert label == str(expected.dl.label)
        assert score == pytest.approx(expected.score, abs=1e-4)  # other kernels for a batch than for one row


def test_the_example_prints_the_types_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example names the type of each file that it is given."""
    (tmp_path / "data.json").write_text(json.dumps({"settings": {"names": ["a", "b"], "depth": 3}}, indent=2))
    file_types.main([__file__, str(tmp_path / "data.json")])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "python",
        "json",
    ]


def test_columns_of_numbers_are_one_matrix_whatever_they_are_called() -> None:
    """A sole input takes the columns side by side, also where one of them has its name."""
    matrix = [Input("x", np.dtype("float32"), (None, 3))]
    columns = {name: np.ones(2, "float32") for name in ("x", "y", "z")}
    assert bind(matrix, columns)["x"].shape == (2, 3)


def test_the_columns_of_a_matrix_go_where_the_metadata_names_them(tmp_path: Path) -> None:
    """A matrix has no names but those that the graph's metadata may hold; other names are refused at registration."""
    model = onnx.ModelProto.FromString(LINEAR.SerializeToString())
    helper.set_model_props(model, {"feature_names": json.dumps(["a", "b", "c"])})
    rows = {name: RANDOM.normal(size=4).astype("float32") for name in ("c", "a", "b")}
    wanted = np.column_stack([rows["a"], rows["b"], rows["c"]]) @ WEIGHTS
    saved = FRAMEWORK.save(model, tmp_path, {}, rows)
    for answers in (FRAMEWORK.load(saved.path, saved.format, {}), FRAMEWORK.wrap(model, {})):
        np.testing.assert_allclose(answers.infer(rows)["output"], wanted, rtol=1e-5)
    with pytest.raises(InvalidInput, match=r"^z: the model was not fitted on it, but on a, b, c"):
        FRAMEWORK.save(model, tmp_path, {}, {"z": rows["a"], "b": rows["b"], "c": rows["c"]})


@pytest.mark.parametrize("text", ["a,b,c", '{"a": 1}', "[1, 2, 3]", ""])
def test_metadata_of_another_meaning_names_no_columns(text: str, tmp_path: Path) -> None:
    """What is no JSON list of names was written for another reader."""
    model = onnx.ModelProto.FromString(LINEAR.SerializeToString())
    helper.set_model_props(model, {"feature_names": text})
    rows = {name: RANDOM.normal(size=4).astype("float32") for name in ("c", "a", "b")}
    saved = FRAMEWORK.save(model, tmp_path, {}, rows)
    found = FRAMEWORK.load(saved.path, saved.format, {}).infer(rows)["output"]
    np.testing.assert_allclose(found, np.column_stack(list(rows.values())) @ WEIGHTS, rtol=1e-5)


def test_inputs_of_a_graph_are_fed_by_name() -> None:
    """Inputs of one type are told apart by their names, in whatever order the columns come."""
    model = _model(
        [helper.make_node("Sub", ["left", "right"], ["y"])],
        [_value("left", FLOAT), _value("right", FLOAT)],
        [_value("y", FLOAT)],
    )
    columns = {"right": np.array([1.0], "float32"), "left": np.array([5.0], "float32")}
    assert FRAMEWORK.wrap(model, {}).infer(columns)["output"].tolist() == [4.0]


def test_a_matrix_in_another_order_than_the_example_is_refused(tmp_path: Path) -> None:
    """Where nothing names the columns, the order of the caller's own rows is the one that counts."""
    rows = {name: RANDOM.normal(size=4).astype("float32") for name in ("a", "b", "c")}
    signature = Signature([Field(name, "float32") for name in ("c", "b", "a")])
    with (
        Registry(f"sqlite:///{tmp_path}/models.db") as registry,
        pytest.raises(InvalidInput, match=r"row 0 of the example"),
    ):
        registry.register("m", "1", LINEAR, example=rows, signature=signature)


def test_a_size_of_minus_one_is_open() -> None:
    """That is how old exporters write a dynamic batch axis."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 3])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "old",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [-1, 3])],
    )
    (found,) = inputs_of(helper.make_model(graph))
    assert found.shape == (None, 3)
