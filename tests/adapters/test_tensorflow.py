"""The TensorFlow adapter: the contract on real models, and what is its own."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import layers

from modelserve.adapters.frameworks.tensorflow import TensorFlowFramework
from modelserve.errors import ArtifactUnsafe, InferenceFailed, InvalidInput, LoadError, LoadFailed
from modelserve.ports import Framework
from modelserve.registry import Registry
from modelserve.signature import Field, Signature
from modelserve.testing.frameworks import Case, FrameworkContract
from modelserve.types import SAFE, Runtime
from tests.names import stable

_F = TypeVar("_F")

NUMBERS = np.random.default_rng(0)
MATRIX = NUMBERS.normal(size=(64, 4)).astype("float32")
IMAGES = NUMBERS.normal(size=(64, 8, 8, 3)).astype("float32")
WORDS = np.array([f"{a} {b}" for a in ("good", "bad", "fine", "poor") for b in ("food", "staff", "room", "view")] * 4)
FRAME = pd.DataFrame(MATRIX, columns=["a", "b", "c", "d"])
MIXED = {"ids": NUMBERS.integers(0, 10, (64, 3)), "spend": MATRIX[:, :1].ravel()}
CODE = Runtime(allow_code=True)


# -- the models --------------------------------------------------------------------------------------------


def _perceptron() -> Any:
    """Dropout and normalisation would show at once if the model were called as in training."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(16, activation="relu"),
            layers.BatchNormalization(moving_mean_initializer="ones"),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )


def _network() -> Any:
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(2)]
    )


def _two_inputs() -> Any:
    ids, spend = keras.Input((3,), dtype="int64", name="ids"), keras.Input((1,), name="spend")
    joined = layers.Concatenate()([layers.Flatten()(layers.Embedding(10, 4)(ids)), spend])
    return keras.Model([ids, spend], {"score": layers.Dense(1)(joined), "kind": layers.Dense(5)(joined)})


def _text() -> Any:
    words = layers.TextVectorization(output_sequence_length=4)
    words.adapt(WORDS)
    text = keras.Input((), dtype="string", name="text")
    return keras.Model(text, layers.Dense(2)(layers.GlobalMaxPooling1D()(layers.Embedding(20, 4)(words(text)))))


def _flags() -> Any:
    active = keras.Input((2,), dtype="bool", name="active")
    return keras.Model(active, layers.Dense(1)(layers.Rescaling(2.0)(active)))


def _traced(*signature: Any) -> Callable[[_F], _F]:
    """Return tf.function, with a type."""
    decorator: Callable[[_F], _F] = tf.function(input_signature=signature or None)
    return decorator


class Scorer(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    """A module with functions of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = tf.Variable([[1.0], [2.0], [3.0], [4.0]])

    @_traced()
    def __call__(self, x: Any) -> Any:
        """A function whose types are those of its first call."""
        return tf.matmul(x, self.weights)

    @_traced(tf.TensorSpec([None, 4], tf.float32))
    def both(self, rows: Any) -> Any:
        """A function that says what it takes, and gives two answers."""
        return tf.reduce_sum(rows, axis=1), rows * 2.0

    @_traced()
    def label(self, x: Any) -> Any:
        """A function that answers with text."""
        return {"name": tf.where(x[:, 0] > 0.0, "grün", "rot"), "half": tf.cast(x, tf.bfloat16)}

    @_traced()
    def ragged(self, x: Any) -> Any:
        """A function whose answer is no tensor."""
        return tf.RaggedTensor.from_tensor(x)

    @_traced()
    def bytes(self, x: Any) -> Any:
        """A function that answers with what is no text."""
        return tf.fill([tf.shape(x)[0]], b"\xff")

    @_traced()
    def picky(self, x: Any) -> Any:
        """A function that does not take every row."""
        with tf.control_dependencies([tf.debugging.assert_less(x, 100.0, message="too large")]):
            return tf.identity(x)


PERCEPTRON = _perceptron()
TWO_INPUTS = _two_inputs()


def _call(model: Any, rows: Any) -> Any:
    """Call a model as its user would, on tensors."""
    if isinstance(rows, pd.DataFrame):
        rows = rows.to_numpy()
    if isinstance(rows, dict):
        rows = {"ids": tf.constant(rows["ids"]), "spend": tf.constant(rows["spend"][:, None])}
    answer = model(tf.constant(rows) if isinstance(rows, np.ndarray) else rows)
    return {name: part.numpy() for name, part in answer.items()} if isinstance(answer, dict) else answer.numpy()


def _both(model: Any, rows: Any) -> Any:
    return {f"output_{i}": part.numpy() for i, part in enumerate(model.both(tf.constant(rows)))}


def _case(name: str, model: Any, rows: Any, bare: Any = _call, **options: Any) -> Case:
    return Case(name, model, rows, bare, {"method": "predict"} | options, runtime=CODE)


CASES = [
    _case("perceptron in inference mode", PERCEPTRON, MATRIX),
    _case("a frame stacked to a matrix", PERCEPTRON, FRAME),
    _case("convolutions", _network(), IMAGES),
    _case("two inputs, two outputs", TWO_INPUTS, MIXED),
    _case("text", _text(), WORDS),
    _case("booleans", _flags(), MATRIX[:, :2] > 0.0),
    _case("Keras as SavedModel", TWO_INPUTS, MIXED, format="saved_model"),
    _case("module", Scorer(), MATRIX),
    _case("a module's other function", Scorer(), MATRIX, _both, method="both"),
]


class TestTensorFlow(FrameworkContract):
    @pytest.fixture
    def framework(self) -> Framework:
        return TensorFlowFramework()

    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param  # type: ignore[no-any-return]


FRAMEWORK = TensorFlowFramework()


def _loaded(model: Any, folder: Path, rows: Any, runtime: Runtime = CODE, **options: Any) -> Any:
    saved = FRAMEWORK.save(model, folder, options, _columns(rows))
    return FRAMEWORK.load(saved.path, saved.format, saved.load_options, runtime)


def _columns(rows: Any) -> dict[str, Any]:
    return rows if isinstance(rows, dict) else {"x": rows}


# -- calling -----------------------------------------------------------------------------------------------


def test_a_model_is_traced_once(tmp_path: Path) -> None:
    """Batches of every size run through one graph: the Python of a model runs once per load, not once per size."""
    traces = []

    class Counting(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
        def __call__(self, x: Any) -> Any:
            traces.append(1)
            return x * 2.0

    model = FRAMEWORK.wrap(Counting(), {})
    for count in (1, 2, 7, 64):
        assert model.infer({"x": MATRIX[:count]})["output"].shape == (count, 4)
    assert len(traces) == 1


def test_xla_answers_as_the_plain_graph_does(tmp_path: Path) -> None:
    """With ``compile`` the graph is compiled by XLA, and its answers are the same within 1e-5."""
    plain = _loaded(PERCEPTRON, tmp_path, MATRIX)
    compiled = _loaded(PERCEPTRON, tmp_path, MATRIX, Runtime(allow_code=True, compile=True))
    assert compiled._graph[0].function_def.attr["_XlaMustCompile"].b
    for count in (1, 7, 64):
        batch = {"x": MATRIX[:count]}
        assert np.allclose(compiled.infer(batch)["output"], plain.infer(batch)["output"], rtol=1e-5, atol=1e-5)


def test_strings_are_not_given_to_xla(tmp_path: Path) -> None:
    """XLA has no strings, and a model that splits them takes the process down with it: the load is refused in words."""
    with pytest.raises(LoadFailed, match="XLA does not take strings"):
        _loaded(_text(), tmp_path, WORDS, Runtime(allow_code=True, compile=True))


def test_a_regression_head_keeps_its_shape() -> None:
    """What the model answers as rows of one number stays that: (n, 1) is not flattened."""
    outputs = FRAMEWORK.wrap(TWO_INPUTS, {}).infer({name: column[:3] for name, column in MIXED.items()})
    assert {name: column.shape for name, column in outputs.items()} == {"kind": (3, 5), "score": (3, 1)}


def test_what_a_model_raises_is_said_in_one_line(tmp_path: Path) -> None:
    """An error of TensorFlow is reported by the line that says what is wrong, without traces and graph nodes."""
    model = _loaded(TWO_INPUTS, tmp_path, MIXED)
    with pytest.raises(InferenceFailed, match=r"^the model raised InvalidArgumentError: indices\[0,1\] = 99 is not in"):
        model.infer({"ids": np.array([[0, 99, 0]]), "spend": np.zeros(1, "float32")})
    with pytest.raises(
        InferenceFailed, match=r"^the model raised InvalidArgumentError: assertion failed: [^\n]{,300}$"
    ):
        _loaded(Scorer(), tmp_path, MATRIX, method="picky").infer({"x": MATRIX + 1000.0})


def test_a_device_that_is_not_there_is_a_load_error(tmp_path: Path) -> None:
    """A model never runs elsewhere than where it was put: a missing GPU is named, and so is what TensorFlow lacks."""
    with pytest.raises(LoadFailed, match=r"no device 'cuda:63' here: TensorFlow sees \d+ GPUs"):
        _loaded(PERCEPTRON, tmp_path, MATRIX, Runtime(allow_code=True, device="cuda:63"))
    with pytest.raises(LoadFailed, match="not on 'mps'"):
        _loaded(PERCEPTRON, tmp_path, MATRIX, Runtime(allow_code=True, device="mps"))


# -- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "field", "problem"),
    [
        (MATRIX.astype("float64"), "x", r"takes float32\[4\] here, the example has float64\[4\].*astype\('float32'\)"),
        (MATRIX[:, :3], "x", r"takes float32\[4\] here, the example has float32\[3\]"),
        (dict.fromkeys("abc", MATRIX[:, 0]), "a", "the example has 3 columns"),
        ({"a": MATRIX[:, 0], "b": WORDS.astype(object)}, "example", "takes the inputs .*, the example has a, b"),
        ({"n": np.arange(4), "f": MATRIX[:4, 0]}, "n", "takes float32"),
    ],
    ids=["type", "size", "number of columns", "names", "one of several types"],
)
def test_an_example_that_does_not_fit_is_refused_by_name(tmp_path: Path, rows: Any, field: str, problem: str) -> None:
    """Nothing is cast or cut in silence: the column is named, with what the model takes and what to do."""
    with pytest.raises(InvalidInput, match=problem) as refused:
        FRAMEWORK.save(PERCEPTRON, tmp_path, {}, _columns(rows))
    assert refused.value.field == field


def test_columns_are_given_by_name_whatever_their_order(tmp_path: Path) -> None:
    """Inputs of the same type are told apart by their names alone, in both formats."""
    left, right = keras.Input((1,), name="left"), keras.Input((1,), name="right")
    model = keras.Model({"right": right, "left": left}, layers.Subtract()([left, right]))
    batch = {"right": np.array([1.0], "float32"), "left": np.array([5.0], "float32")}
    for name in ("keras", "saved_model"):
        assert _loaded(model, tmp_path, batch, format=name).infer(batch)["output"].tolist() == [[4.0]]


def test_columns_in_another_order_than_the_example_are_refused(tmp_path: Path) -> None:
    """A matrix has no names: the order of the caller's own rows is the one that counts."""
    signature = Signature([Field(name, "float32") for name in reversed(FRAME.columns)])
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        registry.register("m", "1", PERCEPTRON, example=FRAME[:4])
        with pytest.raises(InvalidInput, match=r"row \d of the example is answered"):
            registry.register("m", "2", PERCEPTRON, example=FRAME[:4], signature=signature)


def test_a_graph_that_answers_differently_from_the_model_is_refused(tmp_path: Path) -> None:
    """A model is called as its owner calls it, and not only as the graph that was made of it."""

    class Moody(keras.Model):  # type: ignore[misc]  # TensorFlow has no types
        def call(self, inputs: Any) -> Any:
            return inputs * (2.0 if tf.executing_eagerly() else 3.0)

    with (
        Registry(f"sqlite:///{tmp_path}/models.db") as registry,
        pytest.raises(InvalidInput, match=r"row 0 of the example is answered"),
    ):
        registry.register("m", "1", Moody(), example=MATRIX[:4], format="saved_model")


def test_a_model_without_declared_inputs_takes_its_columns_as_they_are(tmp_path: Path) -> None:
    """A subclassed model gets a sole column bare and several by name; saved whole, it needs no class to be loaded."""

    class Sum(keras.Model):  # type: ignore[misc]  # TensorFlow has no types
        def call(self, inputs: Any) -> Any:
            return inputs["a"] + inputs["b"]

    batch = {"b": MATRIX[:, 0], "a": MATRIX[:, 1]}
    found = _loaded(Sum(), tmp_path, batch, format="saved_model").infer(batch)["output"]
    assert np.array_equal(found, MATRIX[:, 0] + MATRIX[:, 1])


def test_a_model_built_by_its_first_call_takes_other_batch_sizes(tmp_path: Path) -> None:
    """Keras remembers the number of rows of the first call; it is no limit."""
    model = keras.Sequential([layers.Dense(2)])
    model(MATRIX)
    assert _loaded(model, tmp_path, MATRIX).infer({"x": MATRIX[:3]})["output"].shape == (3, 2)


def test_a_number_of_rows_that_is_fixed_is_refused(tmp_path: Path) -> None:
    """A function whose signature names a number of rows cannot take batches; the error says what to write."""

    class Fixed(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
        @_traced(tf.TensorSpec([8, 4], tf.float32))
        def __call__(self, x: Any) -> Any:
            return x

    with pytest.raises(InvalidInput, match="needs a first dimension of None"):
        FRAMEWORK.save(Fixed(), tmp_path, {}, {"x": MATRIX[:8]})


def test_nulls_have_no_form_in_tensorflow() -> None:
    """A missing string fails the batch with an error, it does not become some text."""
    with pytest.raises(InferenceFailed, match="NoneType"):
        FRAMEWORK.wrap(_text(), {}).infer({"text": np.array([None], dtype=object)})


# -- outputs -----------------------------------------------------------------------------------------------


def test_text_and_short_floats_are_made_fit_for_json(tmp_path: Path) -> None:
    """Bytes become text and bfloat16 becomes float32, in their shapes."""
    outputs = _loaded(Scorer(), tmp_path, MATRIX, method="label").infer({"x": np.array([[1.5, 0, 0, 0]], "float32")})
    assert outputs["name"].tolist() == ["grün"]
    assert (outputs["half"].dtype, outputs["half"].tolist()) == (np.float32, [[1.5, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(("method", "problem"), [("ragged", "to_tensor"), ("bytes", "no UTF-8 text")])
def test_answers_without_a_json_form_are_refused(method: str, problem: str) -> None:
    """Ragged tensors and bytes that are no text fail with the output's name and what to do."""
    with pytest.raises(InferenceFailed, match=problem):
        FRAMEWORK.wrap(Scorer(), {"method": method}).infer({"x": MATRIX[:2]})


def test_an_answer_that_cannot_be_served_is_refused_at_registration(tmp_path: Path) -> None:
    """A SavedModel of a ragged answer is never written."""
    with pytest.raises(InvalidInput, match="to_tensor"):
        FRAMEWORK.save(Scorer(), tmp_path, {"method": "ragged"}, {"x": MATRIX})


# -- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "field", "problem"),
    [
        (Scorer(), {"method": "nope"}, "method", "no function 'nope'; it has predict, 'both', 'bytes', 'label'"),
        (Scorer(), {"method": "_flatten"}, "method", "no function"),
        (Scorer(), {"format": "keras"}, "format", "use 'saved_model'"),
        (Scorer(), {"format": "h5"}, "format", "use 'keras', 'saved_model'"),
        (PERCEPTRON, {"method": "score"}, "method", "answers by 'predict' alone"),
        (PERCEPTRON, {"factory": "nets:make"}, "factory", "saved whole"),
        (PERCEPTRON, {"trusted": ["acme.Layer"]}, "trusted", "allow_code"),
        (object(), {}, "model", "neither a Keras model nor a tf.Module"),
        (Path("model.h5"), {}, "format", "load_model"),
        (Path("model.bin"), {}, "format", "cannot tell"),
    ],
    ids=stable,
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, model: Any, options: dict[str, Any], field: str, problem: str
) -> None:
    """Each is refused by its name, with what could be said instead."""
    with pytest.raises(InvalidInput, match=problem) as refused:
        FRAMEWORK.save(model, tmp_path, options, {"x": MATRIX})
    assert refused.value.field == field


def test_a_saved_model_needs_an_example(tmp_path: Path) -> None:
    """Its signature is made from one."""
    with pytest.raises(InvalidInput, match="example=X"):
        FRAMEWORK.save(Scorer(), tmp_path, {}, None)


def test_a_signature_that_is_missing_is_a_load_error(tmp_path: Path) -> None:
    """A folder is not opened at registration; the load names the signatures that there are."""
    saved = FRAMEWORK.save(Scorer(), tmp_path, {"method": "both"}, {"x": MATRIX})
    again = FRAMEWORK.save(saved.path, tmp_path, {"method": "other"}, {"x": MATRIX})
    with pytest.raises(LoadFailed, match="no signature 'other'; it has 'both'"):
        FRAMEWORK.load(again.path, again.format, again.load_options, CODE)


def test_a_model_that_was_loaded_from_a_folder_can_be_registered(tmp_path: Path) -> None:
    """The object that TensorFlow makes of a SavedModel answers by its signatures, live and saved again."""
    saved = FRAMEWORK.save(Scorer(), tmp_path, {}, {"x": MATRIX})
    live = tf.saved_model.load(str(saved.path))
    (tmp_path / "again").mkdir()
    found = _loaded(live, tmp_path / "again", MATRIX).infer({"x": MATRIX})["output"]
    assert np.array_equal(found, _call(Scorer(), MATRIX))


def test_keras_on_another_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras models of PyTorch or JAX are told apart before anything is saved."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(InvalidInput, match="KERAS_BACKEND=tensorflow"):
        FRAMEWORK.save(PERCEPTRON, tmp_path, {}, {"x": MATRIX})


def test_a_class_that_is_not_registered_is_named(tmp_path: Path) -> None:
    """A layer of the user's own that the process does not know fails the load, and the error says the ways out."""

    class Doubling(layers.Layer):  # type: ignore[misc]  # TensorFlow has no types
        def call(self, x: Any) -> Any:
            return x * 2.0

    model = keras.Sequential([keras.Input((4,)), Doubling()])
    saved = FRAMEWORK.save(model, tmp_path, {}, {"x": MATRIX})
    with pytest.raises(LoadFailed, match=r"Could not locate class 'Doubling'.*format='saved_model'"):
        FRAMEWORK.load(saved.path, saved.format, saved.load_options, CODE)
    assert _loaded(model, tmp_path, MATRIX, format="saved_model").infer({"x": MATRIX})["output"].shape == (64, 4)


# -- what is not to be trusted -----------------------------------------------------------------------------


class Mischief:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def _forged(folder: Path, config: Callable[[Any], Any] | None = None, members: dict[str, bytes] | None = None) -> Path:
    """Write a Keras file whose configuration was edited, and to which members were added."""
    saved = FRAMEWORK.save(PERCEPTRON, folder, {}, {"x": MATRIX})
    forged = folder / "forged.keras"
    with zipfile.ZipFile(saved.path) as original, zipfile.ZipFile(forged, "w") as copy:
        parts = {name: original.read(name) for name in original.namelist()} | (members or {})
        if config is not None:
            document = json.loads(parts["config.json"])
            config(document)
            parts["config.json"] = json.dumps(document).encode()
        for name, data in parts.items():
            copy.writestr(name, data)
    return forged


def _with_layer(**layer: Any) -> Callable[[Any], Any]:
    return lambda config: config["config"]["layers"].insert(1, layer)


def _function(module: str, name: str) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def _lambda_layer(function: Any, **arguments: Any) -> Callable[[Any], Any]:
    config = {"name": "f", "function": function, "arguments": arguments}
    return _with_layer(module="keras.layers", class_name="Lambda", config=config, registered_name=None)


def test_with_defaults_nothing_is_read_nor_imported(tmp_path: Path) -> None:
    """Until code is allowed, a load is refused without a look at the file, and without TensorFlow in the process."""
    for name in ("keras", "saved_model"):
        with pytest.raises(ArtifactUnsafe, match=r"ModelOptions\(allow_code=True\)"):
            FRAMEWORK.load(tmp_path / "is not there", name, {}, SAFE)
    program = (
        "import sys; from pathlib import Path; from modelserve import plugins, errors\n"
        "try: plugins.framework('tensorflow').load(Path('x'), 'keras', {})\n"
        "except errors.ArtifactUnsafe: sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)\n"
        "sys.exit('loaded')"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_a_lambda_layer_is_never_loaded(tmp_path: Path) -> None:
    """A function as bytecode is refused when it is registered, as an object or by path, and where code is allowed."""
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x * 2.0)])
    model.save(tmp_path / "lambda.keras")
    for refused in (
        lambda: FRAMEWORK.save(model, tmp_path, {}, {"x": MATRIX}),
        lambda: FRAMEWORK.save(tmp_path / "lambda.keras", tmp_path, {}),
        lambda: FRAMEWORK.load(tmp_path / "lambda.keras", "keras", {}, SAFE),
        lambda: FRAMEWORK.load(tmp_path / "lambda.keras", "keras", {}, CODE),
    ):
        with pytest.raises(ArtifactUnsafe):
            refused()
    assert _loaded(model, tmp_path, MATRIX, format="saved_model").infer({"x": MATRIX})["output"].shape == (64, 4)


@pytest.mark.parametrize("name", ["keras", "saved_model"])
def test_other_files_under_its_name_are_not_opened(tmp_path: Path, name: str) -> None:
    """A pickle and an HDF5 file that call themselves models of a format are refused before any reader sees them."""
    fake = tmp_path / "model.keras"
    for data in (pickle.dumps(Mischief(tmp_path / "ran")), b"\x89HDF\r\n\x1a\n" + bytes(100)):
        fake.write_bytes(data)
        with pytest.raises(LoadError):
            FRAMEWORK.load(fake, name, {}, CODE)
        with pytest.raises(LoadError):
            FRAMEWORK.save(fake, tmp_path, {"format": name})
    assert not (tmp_path / "ran").exists()


def test_a_wrong_checksum_is_a_load_error(tmp_path: Path) -> None:
    """A flipped bit anywhere in the archive is noticed before Keras reads it."""
    saved = FRAMEWORK.save(PERCEPTRON, tmp_path, {}, {"x": MATRIX})
    data = bytearray(saved.path.read_bytes())
    data[data.index(b"HDF") + 5000] ^= 1
    saved.path.write_bytes(data)
    with pytest.raises(LoadFailed, match=r"model\.weights\.h5 in it has a wrong checksum"):
        FRAMEWORK.load(saved.path, saved.format, saved.load_options, CODE)


FORGERIES = {
    "a class of os": _with_layer(module="os", class_name="system", config={"command": "touch ran"}),
    "a registered class of os": _with_layer(
        module="os", class_name="system", config={"command": "touch ran"}, registered_name="os>system"
    ),
    "a function of os": _lambda_layer(_function("os", "system")),
    "a download": _lambda_layer(_function("keras.utils", "get_file"), origin="file:///etc/hostname"),
    "the switch of safe mode": _lambda_layer(_function("keras.config", "enable_unsafe_deserialization")),
    "bytecode as Keras 2 wrote it": _lambda_layer(["4wAAAA==", None, None]),
    "an inner function of Keras": _with_layer(
        module="keras.src.utils.file_utils", class_name="makedirs", config={"path": "ran"}
    ),
    "a SavedModel elsewhere": _with_layer(
        module="keras.layers", class_name="TFSMLayer", config={"name": "s", "filepath": "elsewhere"}
    ),
    "a pickle of PyTorch": _with_layer(
        module="keras.layers", class_name="TorchModuleWrapper", config={"name": "t", "module": "gASVIA=="}
    ),
    "a vocabulary elsewhere": _with_layer(
        module="keras.layers", class_name="StringLookup", config={"name": "v", "vocabulary": "secret.txt"}
    ),
    "no model but a function": lambda config: config.update(_function("os", "system")),
    "nothing": lambda config: config.clear(),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_configuration_cannot_call_what_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgery: str
) -> None:
    """Names of functions outside Keras, of its own helpers, and of files elsewhere: a typed error, and nothing is run.

    That holds too in a program that has switched off Keras's safe mode for itself.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret\nwords\n")
    forged = _forged(tmp_path, FORGERIES[forgery])

    def load_where_all_is_allowed() -> None:
        keras.config.enable_unsafe_deserialization()
        FRAMEWORK.load(forged, "keras", {}, CODE)

    with ThreadPoolExecutor(1) as a_thread_of_its_own, pytest.raises(LoadError):
        a_thread_of_its_own.submit(load_where_all_is_allowed).result()
    assert not (tmp_path / "ran").exists()


def test_weights_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    """Weights that point to another file of the machine are not read from there."""
    (tmp_path / "secret").write_bytes(bytes(4 * 16 * 4))
    forged = _forged(tmp_path)
    weights = tmp_path / "weights.h5"
    with zipfile.ZipFile(forged) as archive:
        weights.write_bytes(archive.read("model.weights.h5"))
    with h5py.File(weights, "r+") as file:
        del file["layers/dense/vars/0"]
        where = [(str(tmp_path / "secret"), 0, 4 * 16 * 4)]
        file["layers/dense/vars"].create_dataset("0", (4, 16), "float32", external=where)
    with pytest.raises(LoadFailed, match="external"):
        FRAMEWORK.load(_forged(tmp_path, members={"model.weights.h5": weights.read_bytes()}), "keras", {}, CODE)


def test_members_that_keras_does_not_write_are_refused(tmp_path: Path) -> None:
    """An archive with anything else in it is not taken for a Keras file."""
    with pytest.raises(ArtifactUnsafe, match=r"has a member 'setup\.py'"):
        FRAMEWORK.load(_forged(tmp_path, members={"setup.py": b""}), "keras", {}, CODE)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_what_would_fill_the_memory_is_not_unpacked(member: str, tmp_path: Path) -> None:
    """A small file of much nothing is refused by the sizes it names, at registration by its path too."""
    bomb = tmp_path / "bomb.keras"
    with zipfile.ZipFile(_forged(tmp_path)) as original, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in original.namelist():
            copy.writestr(name, b" " * (70 * 1024 * 1024) if name == member else original.read(name))
    with pytest.raises(ArtifactUnsafe, match="bytes unpacked"):
        FRAMEWORK.load(bomb, "keras", {}, CODE)
    with pytest.raises(ArtifactUnsafe, match="bytes unpacked"):
        FRAMEWORK.save(bomb, tmp_path, {})


def test_a_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    """Keras chooses a reader by the suffix; here the format alone decides, so a cache may name files as it likes."""
    saved = FRAMEWORK.save(PERCEPTRON, tmp_path, {}, {"x": MATRIX})
    for name in ("0123abcd", "model.h5"):
        path = saved.path.rename(tmp_path / name)
        assert FRAMEWORK.load(path, saved.format, {}, CODE).infer({"x": MATRIX[:2]})["output"].shape == (2, 3)
        path.rename(saved.path)


def test_a_saved_model_that_writes_files_is_not_run_unasked(tmp_path: Path) -> None:
    """A graph can write files: registered by its path it is not loaded, nor with defaults."""
    target = str(tmp_path / "ran")

    class Writer(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
        @_traced(tf.TensorSpec([None, 4], tf.float32))
        def __call__(self, x: Any) -> Any:
            tf.io.write_file(target, "here")
            return x

    tf.saved_model.save(writer := Writer(), str(tmp_path / "writer"), signatures=writer.__call__)
    with Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        version = registry.register("m", "1", tmp_path / "writer", example=MATRIX[:4])
    assert (version.framework, version.artifact.format) == ("tensorflow", "saved_model")
    with pytest.raises(ArtifactUnsafe):
        FRAMEWORK.load(tmp_path / "writer", "saved_model", version.load_options, SAFE)
    assert not (tmp_path / "ran").exists()
    FRAMEWORK.load(tmp_path / "writer", "saved_model", version.load_options, CODE).infer({"x": MATRIX})
    assert (tmp_path / "ran").exists()


def test_a_damaged_saved_model_is_a_load_error(tmp_path: Path) -> None:
    """A folder with junk in place of the program does not load, and says so in one line."""
    (tmp_path / "saved_model.pb").write_bytes(b"junk")
    with pytest.raises(LoadFailed, match=r"^TensorFlow cannot read the artifact: [^\n]*$"):
        FRAMEWORK.load(tmp_path, "saved_model", {}, CODE)
