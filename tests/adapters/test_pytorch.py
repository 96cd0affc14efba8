"""The PyTorch adapter: the contract on real networks, and what is its own."""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import json
import pickle
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import modelserve as ms
from modelserve.adapters.frameworks.pytorch import PyTorchFramework
from modelserve.adapters.frameworks.pytorch.calls import choose
from modelserve.adapters.frameworks.pytorch.expressions import check_guard, check_layout, check_size
from modelserve.adapters.frameworks.pytorch.halving import Halving
from modelserve.errors import ArtifactUnsafe, InferenceFailed, InvalidInput, LoadError, LoadFailed
from modelserve.ports import Framework, SavedModel
from modelserve.testing.frameworks import Case, FrameworkContract
from modelserve.types import Runtime
from tests.adapters import nets

NUMBERS = np.random.default_rng(0)
MATRIX = NUMBERS.normal(size=(64, 6)).astype("float32")
IMAGES = NUMBERS.normal(size=(64, 3, 32, 32)).astype("float32")
STEPS = NUMBERS.normal(size=(64, 4, 6)).astype("float32")
IDS = NUMBERS.integers(0, 50, (64, 8))
MASK = (NUMBERS.random((64, 8)) > 0.3).astype("float32")
TEXT = {"ids": IDS, "mask": MASK}
SCALARS = {name: MATRIX[:, i] for i, name in enumerate(("age", "height", "weight", "pulse", "sugar", "iron"))}


def _made(make: Any, **_: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = make()
    return module.eval()


def _plain(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {name: part.numpy() for name, part in answer.items()}
    if isinstance(answer, tuple):
        return {f"output_{i}": part.numpy() for i, part in enumerate(answer)}
    return answer.numpy()


def _bare(module: nn.Module, rows: Any) -> Any:
    with torch.no_grad():
        if isinstance(rows, dict):
            return _plain(module(**{name: torch.from_numpy(column) for name, column in rows.items()}))
        return _plain(module(torch.from_numpy(rows)))


def _bare_matrix(module: nn.Module, rows: Any) -> Any:
    with torch.no_grad():
        return _plain(module(torch.from_numpy(np.column_stack(list(rows.values())))))


def _weights(name: str, make: Any, factory: str, rows: Any, **options: Any) -> Case:
    factory = f"tests.adapters.nets:{factory}"
    return Case(name, _made(make), rows, _bare, {"factory": factory, **options}, runtime=Runtime(factories=(factory,)))


# The kernels are those of the bare module, so the answers are equal to the last bit.
CASES = [
    Case("mlp", _made(nets.mlp), MATRIX, _bare),
    Case("images", _made(nets.conv), IMAGES, _bare),
    Case("inputs by name", _made(nets.Text), TEXT, _bare),
    Case("booleans to a tuple", _made(nets.Flags), MASK > 0, _bare),
    Case("ids", _made(nets.Ids), IDS, _bare),
    Case("outputs by name", _made(nets.Heads), MATRIX, _bare),
    Case("scalars as a matrix", _made(nets.mlp), SCALARS, _bare_matrix),
    Case("float64", _made(nets.double), MATRIX.astype("float64"), _bare),
    Case("batch norm and dropout", _made(nets.regularised), MATRIX, _bare),
    _weights("safetensors", nets.mlp, "mlp", MATRIX),
    _weights("tied weights", nets.Tied, "Tied", MATRIX),
    _weights("state dict", nets.Heads, "Heads", MATRIX, format="state_dict"),
]


class TestPyTorch(FrameworkContract):
    @pytest.fixture
    def framework(self) -> Framework:
        return PyTorchFramework()

    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param  # type: ignore[no-any-return]


FRAMEWORK = PyTorchFramework()
MLP = _made(nets.mlp)
EXAMPLE = {"x": MATRIX[:4]}
FACTORY = "tests.adapters.nets:mlp"
TRUSTED = Runtime(factories=(FACTORY,))


def _saved(folder: Path, model: Any = MLP, example: Any = EXAMPLE, **options: Any) -> SavedModel:
    return FRAMEWORK.save(model, folder, options, example)


def _answer(model: Any, example: Any = EXAMPLE) -> Any:
    return model.infer(example)["output"]


# -- what is exported --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (nets.Recurrent, 0.0),
        (nets.Attention, 1e-6),  # its fused kernel for eval mode is not what a traced program calls
    ],
)
def test_layers_that_export_warns_of_are_exported(make: Any, tolerance: float, tmp_path: Path) -> None:
    """Recurrent and attention layers answer as the bare module at every batch size, and nothing warns."""
    module = _made(make)
    saved = _saved(tmp_path, module, {"steps": STEPS[:1]})
    model = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
    for rows in (1, 2, 7, 64):
        assert np.allclose(_answer(model, {"steps": STEPS[:rows]}), _bare(module, STEPS[:rows]), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore")  # torch.export warns of its own ways
@pytest.mark.parametrize("registered", ["module", "file"])
def test_all_that_export_writes_of_its_own_is_let_in(registered: str, tmp_path: Path) -> None:
    """Blocks, constants, sizes and notes pass the check, also in a file that torch.export.save has written."""
    module: Any = _made(nets.Everything)
    if registered == "file":
        shapes = ({0: torch.export.Dim("rows", min=1, max=64)},)
        exported = torch.export.export(module, (torch.zeros(2, 6),), dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / "mine.pt2", extra_files={"notes.txt": "mine"})
    saved = _saved(tmp_path, module if registered == "module" else tmp_path / "mine.pt2")
    model = FRAMEWORK.load(saved.path, saved.format, saved.load_options)
    for rows in (1, 2, 7, 64):
        found = model.infer({"x": MATRIX[:rows]})
        with torch.no_grad():
            expected = module(torch.from_numpy(MATRIX[:rows]))
        for name, part in zip(found, expected, strict=True):
            assert np.array_equal(found[name], part.float().numpy()), name


@pytest.mark.parametrize(
    ("check", "text", "harmless"),
    [
        (check_size, "Mul(Integer(2), Symbol('s77', positive=True, integer=True))", True),
        (check_size, "StrictGreaterThan(Symbol('s0', integer=True), Integer(3))", True),
        (check_size, "2*s0 + FloorDiv(s1, 4)", True),
        (check_size, "Float('1.5', precision=53)", True),
        (check_size, "Symbol('s0; x')", False),
        (check_size, "Add('__import__(1)')", False),
        (check_size, "Float('exit()')", False),
        (check_size, "exit()", False),
        (check_size, "s0.is_integer", False),
        (check_size, "s0[0]", False),
        (check_size, "(lambda: 1)()", False),
        (check_size, "Mul(*s0)", False),
        (check_size, "Symbol('s0', integer=exit())", False),
        (check_size, "[s0 for s0 in s1]", False),
        (check_size, "s0 +", False),
        (check_size, "s0" + "+1" * 6000, False),
        (check_size, "Pow(Symbol('s0', integer=True), Integer(2))", True),
        (check_size, "Pow(Symbol('s0', integer=True), Rational(1, 2))", True),
        (check_size, "Pow(Integer(10), Pow(Integer(10), Integer(10)))", False),
        (check_size, "Pow(Pow(Integer(10), Integer(63)), Integer(63))", False),
        (check_size, "Pow(Integer(10), Symbol('s0', integer=True))", False),
        (check_size, "9**9**9**9", False),
        (check_size, "1 << 10**9", False),
        (check_size, "LShift(Integer(1), Integer(1000000000))", False),
        (check_size, "floor(Float('1e999999999', precision=53))", False),
        (check_size, f"s0 + {10**40}", False),
        (check_guard, "L['ids'].size()[0] == L['mask'].size()[0]", True),
        (check_guard, "L['flat_args'][0].size()[1] % 8 == 0", True),
        (check_guard, "max(1, L['x'].stride()[0]) <= math.floor(2.5) or not L['x']['y'] != -math.inf", True),
        (check_guard, "L['x'].tolist()[0] == 1", False),
        (check_guard, "L['x'].size()[0] == 9**9**9", False),
        (check_guard, "L['x'].size(exit())[0] == 1", False),
        (check_guard, "L[exit()].size()[0] == 1", False),
        (check_guard, "L.size()[0] == 1", False),
        (check_guard, "exit()", False),
        (check_guard, "max(1, key=exit)", False),
        (check_guard, "torch.load('x')", False),
        (check_guard, "math.__dict__", False),
        (check_guard, "L['x'] == 'y'", False),
        (check_guard, "(L['x'] ==\n 1)", False),
        (check_guard, 'L["x"] == 1', False),
        (check_layout, '[1, {"type": null, "context": null, "children_spec": []}]', True),
        (check_layout, '[1, {"type": "builtins.dict", "context": "[\\"a\\"]", "children_spec": []}]', True),
        (check_layout, '[1, {"type": "builtins.dict", "context": "[{\\"a\\": 1}]", "children_spec": []}]', False),
        (check_layout, '[1, {"type": "builtins.set", "context": "null", "children_spec": []}]', False),
        (check_layout, '[2, {"type": null, "context": null, "children_spec": []}]', False),
        (check_layout, "[1]", False),
        (check_layout, "1", False),
    ],
)
def test_expressions_are_let_through_when_they_are_known(check: Any, text: str, harmless: Any) -> None:
    """Arithmetic on sizes passes, comparisons of sizes pass, plain layouts pass; nothing else does."""
    assert check(text) is harmless


@pytest.mark.parametrize("make", [nets.Branching, nets.OfOneSize])
def test_a_model_that_cannot_be_exported_is_pointed_to_its_weights(make: Any, tmp_path: Path) -> None:
    """What decides by values, or works for one batch size only, is refused with the way that does work."""
    with pytest.raises(InvalidInput, match=r"factory=.*format='safetensors'") as refused:
        _saved(tmp_path, make(), {"x": MATRIX[:2]})
    assert refused.value.field == "model"


def test_a_program_is_guarded_against_what_it_was_not_traced_for() -> None:
    """More rows than it was exported for, or rows of another shape, are refused, also after good ones."""
    net, rows = torch.nn.Identity(), torch.zeros(2, 3)
    for most in (None, 8):
        program = torch.export.export(net, (rows,), dynamic_shapes=({0: torch.export.Dim("rows", max=most)},))
        model = FRAMEWORK.wrap(program, {"call": "positional"})
        for count in (2, 8, 2):
            assert model.infer({"x": np.ones((count, 3), "float32")})["output"].shape == (count, 3)
        for odd in (np.ones((2, 4), "float32"), *([] if most is None else [np.ones((9, 3), "float32")])):
            with pytest.raises(AssertionError, match="Guard failed"):
                model.infer({"x": odd})


def test_a_program_for_many_rows_is_guarded_against_few() -> None:
    """Where a program needs a number of rows, or rows of a kind, it is asked about that for every batch."""
    rows = torch.export.Dim("rows", min=33)
    program = torch.export.export(nets.mlp().eval(), (torch.zeros(40, 6),), dynamic_shapes=({0: rows},))
    model = FRAMEWORK.wrap(program, {"call": "positional"})
    assert len(model.infer({"x": np.ones((40, 6), "float32")})["output"]) == 40
    with pytest.raises(AssertionError, match="Guard failed"):
        model.infer({"x": np.ones((1, 6), "float32")})


def test_a_program_of_one_batch_size_is_refused_by_its_path(tmp_path: Path) -> None:
    """A file that could answer its example alone is found out when it is registered, not when it is served."""
    torch.export.save(torch.export.export(MLP, (torch.zeros(4, 6),)), tmp_path / "static.pt2")
    with pytest.raises(InvalidInput, match="dynamic first dimension"):
        _saved(tmp_path, tmp_path / "static.pt2")


def test_programs_are_loaded_by_several_threads_at_once(tmp_path: Path) -> None:
    """torch.export keeps what it reads in globals; replicas that start together do not meet there."""
    saved = _saved(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda _: FRAMEWORK.load(saved.path, saved.format, saved.load_options), range(16)))
    assert all(np.array_equal(_answer(model), _answer(models[0])) for model in models)


def test_programs_are_checked_one_at_a_time(tmp_path: Path) -> None:
    """Another thread that runs in the middle of ``ast.parse``, as when garbage is collected there, disturbs nothing."""
    saved = _saved(tmp_path)
    gc.callbacks.append(_let_others_run)
    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: FRAMEWORK.load(saved.path, saved.format, saved.load_options), range(16)))
    finally:
        gc.callbacks.remove(_let_others_run)
        gc.set_threshold(*threshold)


def _let_others_run(_phase: str, _info: dict[str, int]) -> None:
    time.sleep(0)


def test_an_exported_program_can_be_registered(tmp_path: Path) -> None:
    """A live ExportedProgram is saved as it is; one that was exported for one batch size is refused."""
    rows = torch.export.Dim("rows")
    free = torch.export.export(MLP, (torch.zeros(2, 6),), dynamic_shapes=({0: rows},))
    saved = _saved(tmp_path, free)
    assert saved.format == "pt2"
    assert np.array_equal(
        _answer(FRAMEWORK.load(saved.path, "pt2", saved.load_options)),
        _answer(FRAMEWORK.wrap(free, saved.load_options)),
    )
    with pytest.raises(InvalidInput, match="dynamic first dimension"):
        _saved(tmp_path, torch.export.export(MLP, (torch.zeros(4, 6),)))


def test_a_module_is_left_in_the_mode_it_was_in(tmp_path: Path) -> None:
    """Saving and answering happen in eval mode; afterwards each part is in training or not, as it was before."""
    module = nets.regularised().train()
    module.get_submodule("1").eval()
    before = [part.training for part in module.modules()]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    saved = _saved(tmp_path, module)
    live = FRAMEWORK.wrap(module, saved.load_options)
    assert np.array_equal(_answer(live), _answer(live))
    assert np.array_equal(_answer(live), _answer(FRAMEWORK.load(saved.path, "pt2", saved.load_options)))
    assert [part.training for part in module.modules()] == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


def test_export_takes_example_rows(tmp_path: Path) -> None:
    """Without an example nothing can be traced, and the error says what to pass; weights need none."""
    with pytest.raises(InvalidInput, match="example=X"):
        _saved(tmp_path, example=None)
    saved = _saved(tmp_path, example=None, factory=FACTORY)
    model = FRAMEWORK.load(saved.path, saved.format, saved.load_options, TRUSTED)
    assert np.array_equal(_answer(model), _bare(MLP, MATRIX[:4]))


def test_the_program_tells_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    """No path of the machine that registered a model is written into its artifact."""
    assert b"nets.py" not in _saved(tmp_path, _made(nets.Heads)).path.read_bytes()


# -- how it is called --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "columns", "expected"),
    [
        (lambda a, b: 0, {"b": MASK, "a": IDS}, "keywords"),
        (lambda a, *, b=0: 0, {"a": IDS}, "keywords"),
        (lambda x: 0, {"anything": MASK}, "positional"),
        (lambda x, y=0: 0, {"p": MASK, "q": IDS}, "positional"),
        (lambda *xs: 0, {"p": MASK, "q": IDS}, "positional"),
        (lambda x: 0, SCALARS, "matrix"),
    ],
)
def test_the_way_to_call_is_read_off_the_signature(forward: Any, columns: Any, expected: str) -> None:
    """By keywords where names agree, as a matrix where scalars meet a sole parameter, else in order."""
    assert choose(inspect.signature(forward), columns) == expected


@pytest.mark.parametrize(
    ("forward", "columns", "field"),
    [
        (lambda a, b: 0, {"x": MASK}, "example"),
        (lambda a, *, b: 0, {"x": MASK}, "example"),
        (lambda: 0, {"x": MASK}, "example"),
        (lambda x: 0, {"p": MASK, "q": MASK}, "p"),
        (lambda x: 0, {"p": MASK[:, 0], "q": IDS[:, 0]}, "q"),
        (lambda ids, mask: 0, {"mask": MASK, "tokens": IDS}, "mask"),
        (lambda a, b, c=0: 0, {"x": MASK, "a": IDS}, "a"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(forward: Any, columns: Any, field: str) -> None:
    """Too few, too many or unstackable inputs are refused by name, and those whose place is not that of their name."""
    with pytest.raises(InvalidInput) as refused:
        choose(inspect.signature(forward), columns)
    assert refused.value.field == field


@pytest.mark.parametrize("names", [("p", "q"), ("a", "b", "c", "d", "e", "f")], ids=["positional", "matrix"])
def test_inputs_in_another_order_than_the_example_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    """Where nothing names the arguments, the order of the caller's own rows is the one that counts."""
    model = MLP if "a" in names else _made(Difference)
    rows = {name: MATRIX[:4, i] for i, name in enumerate(names)}
    signature = ms.Signature([ms.Field(name, "float32") for name in reversed(names)])
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:
        registry.register("m", "1", model, example=rows)
        with pytest.raises(InvalidInput, match=r"row \d of the example is answered"):
            registry.register("m", "2", model, example=rows, signature=signature)


class Difference(nn.Module):
    """Tells its arguments apart."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the one less the other."""
        return left - right


def test_the_way_to_call_is_kept(tmp_path: Path) -> None:
    """A version's row says how the model is called, so that whoever loads it does not choose again."""
    assert (
        _saved(tmp_path, _made(nets.Text), {name: column[:4] for name, column in TEXT.items()}).load_options["call"]
        == "keywords"
    )
    assert (
        _saved(tmp_path, MLP, {name: column[:4] for name, column in SCALARS.items()}).load_options["call"] == "matrix"
    )


def test_strings_are_refused_by_name(tmp_path: Path) -> None:
    """PyTorch has no strings: the error names the input, when a model is saved and when it answers."""
    words = {"word": np.array(["a", "b"], dtype=object)}
    with pytest.raises(InvalidInput, match="no tensors of strings") as refused:
        _saved(tmp_path, example=words)
    assert refused.value.field == "word"
    with pytest.raises(InvalidInput, match="no tensors of strings"):
        FRAMEWORK.wrap(MLP, {}).infer(words)


@pytest.mark.parametrize("factory", [None, FACTORY])
def test_the_other_precision_is_named_with_its_fix(factory: str | None, tmp_path: Path) -> None:
    """An example in float64 for weights in float32 is refused with the line that converts it."""
    with pytest.raises(InvalidInput, match=r"example\.astype\('float32'\)") as refused:
        _saved(tmp_path, example={"x": MATRIX.astype("float64")}, factory=factory)
    assert refused.value.field == "x"


def test_whole_numbers_for_a_model_of_floats_are_named_with_their_type(tmp_path: Path) -> None:
    """What PyTorch says of matrices alone is said of the inputs."""
    with pytest.raises(InvalidInput, match=r"does not answer it \(x: int64\[6\]\)"):
        _saved(tmp_path, example={"x": np.ones((4, 6), "int64")})


def test_an_example_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    """The model is tried on the example before anything is written."""
    with pytest.raises(InvalidInput, match="does not answer it"):
        _saved(tmp_path, example={"x": MATRIX[:4, :5]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"method": "predict_proba"}, "method"),
        ({"format": "onnx"}, "format"),
        ({"format": "safetensors"}, "factory"),
        ({"format": "pt2", "factory": FACTORY}, "factory"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, field: str, tmp_path: Path) -> None:
    """A wrong option is named."""
    with pytest.raises(InvalidInput) as refused:
        _saved(tmp_path, **options)
    assert refused.value.field == field


@pytest.mark.parametrize("method", ["predict", "forward", None])
def test_forward_is_what_is_served(method: str | None, tmp_path: Path) -> None:
    """Both names of the method mean a call of the module."""
    assert _saved(tmp_path, method=method).format == "pt2"


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    """Only modules and exported programs can be saved."""
    with pytest.raises(InvalidInput, match=r"neither a torch\.nn\.Module nor"):
        _saved(tmp_path, torch.zeros(3))


# -- what it answers ---------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Answers what it was told to."""

    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(x)


def _returned(answer: Callable[[torch.Tensor], Any]) -> Mapping[str, Any]:
    return FRAMEWORK.wrap(Returns(answer), {}).infer({"x": MATRIX[:2].copy()})


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, x), ["output_0", "output_1"]),
        (lambda x: [x], ["output_0"]),
        (lambda x: OrderedDict(b=x, a=x), ["b", "a"]),
        (lambda x: {"logits": x, "loss": None}, ["logits"]),
        (nets.Answer, ["logits"]),
    ],
)
def test_outputs_get_their_names(answer: Any, names: list[str]) -> None:
    """A tensor, a sequence, a mapping and a dataclass each become named outputs."""
    assert list(_returned(answer)) == names


@pytest.mark.parametrize(
    "answer",
    [lambda x: "word", lambda x: None, lambda x: [], lambda x: {"a": [x]}, lambda x: x.to_sparse()],
    ids=["string", "nothing", "empty", "nested", "sparse"],
)
def test_other_answers_are_refused(answer: Any) -> None:
    """What is no tensor, or a tensor that NumPy has no form for, is an InferenceFailed."""
    with pytest.raises(InferenceFailed, match="the model answered"):
        _returned(answer)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, "float32"), (torch.float16, "float16"), (torch.bool, "bool")]
)
def test_types_that_numpy_lacks_become_float32(dtype: torch.dtype, expected: str) -> None:
    """bfloat16 is answered as float32, everything else as it is."""
    assert _returned(lambda x: x.to(dtype))["output"].dtype == expected


def test_an_answer_shares_no_memory_with_anything() -> None:
    """The answer stays as it is when the input, or a buffer that the model fills again, changes."""
    scratch = torch.zeros(2, 6)
    model = FRAMEWORK.wrap(Returns(lambda x: (scratch.copy_(x), x)), {})
    columns = {"x": MATRIX[:2].copy()}
    first = model.infer(columns)
    columns["x"][:] = 0
    model.infer(columns)
    assert np.array_equal(first["output_0"], MATRIX[:2])
    assert np.array_equal(first["output_1"], MATRIX[:2])


def test_arrays_that_may_not_be_written_are_copied() -> None:
    """A model that works in place cannot change an array that is read-only or a strided view."""
    column = MATRIX[:2].copy()
    column.flags.writeable = False
    model = FRAMEWORK.wrap(Returns(lambda x: x.add_(1)), {})
    assert np.array_equal(_answer(model, {"x": column}), MATRIX[:2] + 1)
    assert np.array_equal(_answer(model, {"x": MATRIX[::-1]}), MATRIX[::-1] + 1)


# -- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["safetensors", "state_dict"])
def test_a_factory_is_called_only_where_it_is_allowed(format_: str, tmp_path: Path) -> None:
    """With defaults no factory runs, and the sentence says how to allow it; allowing another does not help."""
    saved = _saved(tmp_path, factory=FACTORY, format=format_)
    for runtime in (Runtime(), Runtime(factories=("tests.adapters.nets:other",))):
        with pytest.raises(ArtifactUnsafe, match=r"ModelOptions\(factories=\('tests\.adapters\.nets:mlp',\)\)"):
            FRAMEWORK.load(saved.path, saved.format, saved.load_options, runtime)


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("tests.adapters.nets:no_network", "returned a str"),
        ("tests.adapters.nets:fails", "out of order"),
        ("tests.adapters.nets:gone", "does not build a network"),
        ("tests.adapters.missing:gone", "does not build a network"),
        ("tests.adapters.nets:other", "weights are not in the artifact: '3.bias', '3.weight'"),
        ("tests.adapters.nets:conv", "not in the"),
        ("tests.adapters.nets:double", "torch.float32 in the artifact and torch.float64"),
        ("tests.adapters.nets:regularised", "not in the"),
    ],
)
@pytest.mark.parametrize("format_", ["safetensors", "state_dict"])
def test_a_factory_that_does_not_fit_is_a_load_error(factory: str, problem: str, format_: str, tmp_path: Path) -> None:
    """A factory that is missing, fails, or builds something else is told in words."""
    saved = _saved(tmp_path, factory=FACTORY, format=format_)
    with pytest.raises(LoadFailed) as failed:
        FRAMEWORK.load(saved.path, saved.format, {"factory": factory}, Runtime(factories=(factory,)))
    assert problem in str(failed.value)


def test_weights_of_another_shape_are_a_load_error(tmp_path: Path) -> None:
    """A weight that has another shape in the network is named."""
    torch.save({**MLP.state_dict(), "0.bias": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(LoadFailed, match=r"size mismatch for 0\.bias"):
        FRAMEWORK.load(tmp_path / "model.pt", "state_dict", {"factory": FACTORY}, TRUSTED)


def test_a_checkpoint_with_more_than_weights_is_pointed_to_the_state_dict(tmp_path: Path) -> None:
    """A training checkpoint is refused with the line that saves the weights alone."""
    torch.save({"epoch": 3, "model": MLP.state_dict()}, tmp_path / "model.pt")
    with pytest.raises(LoadFailed, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        FRAMEWORK.load(tmp_path / "model.pt", "state_dict", {"factory": FACTORY}, TRUSTED)


# -- what is never run -------------------------------------------------------------------------------------


class Mischief:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def _touch(target: Path) -> str:
    return f"__import__('pathlib').Path('{target}').touch()"


def _rewritten(path: Path, members: Mapping[str, bytes]) -> Path:
    """Return a copy of an archive in which some members are others."""
    copy = path.with_name(f"forged{path.suffix}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        kept = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, data in {**kept, **members}.items():
            new.writestr(f"{root}/{name}", data)
    return copy


def _forged(path: Path, change: Callable[[Any], None], member: str = "models/model.json") -> Path:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(member))
        document = json.loads(archive.read(name))
    change(document)
    return _rewritten(path, {member: json.dumps(document).encode()})


def _refused(path: Path, format_: str, error: type[LoadError] = ArtifactUnsafe) -> str:
    """Return why a file is refused when it is loaded, and check that it is when it is registered."""
    with pytest.raises(error) as refused:
        FRAMEWORK.load(path, format_, {"factory": FACTORY}, TRUSTED)
    with pytest.raises(LoadError):
        FRAMEWORK.save(path, path.parent, {} if format_ == "pt2" else {"factory": FACTORY}, EXAMPLE)
    return str(refused.value)


def _torch_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "member",
    [
        "data/sample_inputs/model.pt",
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/kernel.so",
        "data/xl_model_weights/model_param_config.json",
        "models/other.json",
        "version",
    ],
)
@pytest.mark.parametrize("pickled", [_torch_pickle, pickle.dumps])
def test_no_member_of_a_program_is_unpickled(member: str, pickled: Any, tmp_path: Path) -> None:
    """A malicious pickle does nothing in any place of the archive that is, or once was, one."""
    evil = _rewritten(_saved(tmp_path).path, {member: pickled(Mischief(tmp_path / "ran"))})
    _refused(evil, "pt2", LoadError if member.startswith("data/sample_inputs") else ArtifactUnsafe)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["weights", "constants"])
@pytest.mark.parametrize("name", ["weight_0", "tensor_0", "custom_obj_0", "opaque_obj_0"])
def test_no_tensor_of_a_program_is_unpickled(kind: str, name: str, tmp_path: Path) -> None:
    """A weight or a constant that is declared to be a pickle is refused, under whatever name it lies."""

    def declare(document: Any) -> None:
        document["config"]["0.weight"] = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}

    evil = _forged(_saved(tmp_path).path, declare, f"data/{kind}/model_{kind}_config.json")
    if name in {"weight_0", "tensor_0"}:
        evil = _rewritten(
            evil.rename(tmp_path / "x.pt2"), {f"data/{kind}/{name}": _torch_pickle(Mischief(tmp_path / "ran"))}
        )
    assert "pickled" in _refused(evil, "pt2")
    assert not (tmp_path / "ran").exists()


def _first_node(document: Any) -> Any:
    return document["graph_module"]["graph"]["nodes"][0]


def _forge_guard(document: Any, target: Path) -> None:
    document["guards_code"] = [_touch(target)]


def _forge_guard_message(document: Any, target: Path) -> None:
    document["guards_code"] = [f"""L['x"+{_touch(target).replace("'", '"')}+"'] == 1"""]


def _forge_size(document: Any, target: Path) -> None:
    sizes = next(iter(document["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": _touch(target), "hint": None}}


def _forge_size_within(document: Any, target: Path) -> None:
    sizes = next(iter(document["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": {"metadata": _touch(target)}, "hint": None}}


def _forge_size_of_metadata(document: Any, target: Path) -> None:
    values = document["graph_module"]["graph"]["tensor_values"]
    values["metadata"] = values.pop("linear")
    values["metadata"]["sizes"] = [{"as_expr": {"expr_str": _touch(target), "hint": None}}]
    _first_node(document)["outputs"] = [{"as_tensor": {"name": "metadata"}}]
    _first_node(document)["name"] = "metadata"


def _forge_target(document: Any, target: Path) -> None:
    document["verifiers"] = []
    command = {"name": "", "arg": {"as_string": f"touch {target}"}, "kind": 1}
    _first_node(document).update(target="torch.os.system", inputs=[command])


def _forge_file_operator(document: Any, target: Path) -> None:
    _first_node(document).update(
        target="torch.ops.aten.from_file.default",
        inputs=[
            {"name": "filename", "arg": {"as_string": str(target)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 8}, "kind": 1},
        ],
    )


def _forge_name(document: Any, target: Path) -> None:
    old, new = "linear", f"linear = {_touch(target)}; linear"
    text = json.dumps(document).replace('"linear"', json.dumps(new))
    assert old in text
    document.clear()
    document.update(json.loads(text))


def _forge_layout(document: Any, target: Path) -> None:
    module = target.parent / "evil_layout.py"
    module.write_text(_touch(target), encoding="utf-8")
    layout = {"default_factory_module": "evil_layout", "default_factory_name": "x", "dict_context": []}
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    protocol, spec = json.loads(signature["out_spec"])
    nested = {"type": "collections.defaultdict", "context": layout, "children_spec": [spec]}
    signature["out_spec"] = json.dumps([protocol, nested])


def _forge_enumeration(document: Any, target: Path) -> None:
    (target.parent / "evil_enumeration.py").write_text(_touch(target), encoding="utf-8")
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    context = json.dumps([{"__enum__": True, "fqn": "evil_enumeration:E", "name": "A"}])
    leaf: Any = {"type": None, "context": None, "children_spec": []}
    signature["out_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": [leaf]}])


def _forge_random_seed(document: Any, target: Path) -> None:
    seed = {"name": "seed", "arg": {"as_int": 7}, "kind": 1}
    _first_node(document).update(target="torch.ops.aten.manual_seed.default", inputs=[seed])


REAL_FORGERIES = [
    _forge_guard,
    _forge_size,
    _forge_size_of_metadata,
    _forge_file_operator,
    _forge_layout,
    _forge_enumeration,
]
OTHER_FORGERIES = [_forge_random_seed, _forge_guard_message, _forge_size_within, _forge_target, _forge_name]


@pytest.mark.parametrize("forge", REAL_FORGERIES + OTHER_FORGERIES)
def test_a_program_that_holds_code_is_refused(
    forge: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python in a guard, a size, a name or a layout, and calls of anything but operators, do nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    target = tmp_path / "ran"
    evil = _forged(_saved(tmp_path).path, lambda document: forge(document, target))
    assert "could run code" in _refused(evil, "pt2")
    assert not target.exists()


@pytest.mark.parametrize("forge", REAL_FORGERIES)
def test_the_forgeries_are_real(
    forge: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own loader runs the code that the check keeps from it."""
    monkeypatch.syspath_prepend(tmp_path)
    target = tmp_path / "ran"
    evil = _forged(_saved(tmp_path).path, lambda document: forge(document, target))
    with contextlib.suppress(Exception):
        torch.export.load(evil).module()(torch.zeros(2, 6))
    assert target.exists()


@pytest.mark.parametrize("format_", ["pt2", "state_dict"])
def test_a_renamed_pickle_is_not_opened(format_: str, tmp_path: Path) -> None:
    """A pickle that calls itself a model of PyTorch is refused before anything reads it."""
    fake = tmp_path / ("model.pt2" if format_ == "pt2" else "model.pt")
    fake.write_bytes(pickle.dumps(Mischief(tmp_path / "ran")))
    assert "not opened" in _refused(fake, format_)
    assert not (tmp_path / "ran").exists()


def test_a_state_dict_is_read_by_the_restricted_unpickler(tmp_path: Path) -> None:
    """A malicious pickle in a file of torch.save does nothing, though its factory is allowed."""
    torch.save({"0.weight": Mischief(tmp_path / "ran")}, tmp_path / "model.pt")
    assert "more than tensors" in _refused(tmp_path / "model.pt", "state_dict")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("junk", [b"", b"junk", pickle.dumps({"a": 1}), b"\xff" * 64])
def test_junk_in_place_of_safetensors_is_a_load_error(junk: bytes, tmp_path: Path) -> None:
    """Bytes that are no safetensors are refused in words, with the factory allowed."""
    (tmp_path / "model.safetensors").write_bytes(junk)
    assert "safetensors cannot read" in _refused(tmp_path / "model.safetensors", "safetensors", LoadFailed)


@pytest.mark.parametrize("format_", ["pt2", "state_dict"])
def test_a_damaged_archive_is_a_load_error(format_: str, tmp_path: Path) -> None:
    """One flipped bit in the weights is found by the checksum, before anything is loaded."""
    options = {} if format_ == "pt2" else {"factory": FACTORY, "format": format_}
    path = _saved(tmp_path, **options).path
    weight = MLP.state_dict()["0.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight)] ^= 1
    path.write_bytes(data)
    assert "checksum" in _refused(path, format_, LoadFailed)


def test_ambiguous_archives_are_refused(tmp_path: Path) -> None:
    """Two members of one name, of which a reader may take either, are refused; so is a compressed archive."""
    path = _saved(tmp_path).path
    twice = _rewritten(path, {"MODELS/model.json": b"{}"})
    assert "ambiguous" in _refused(twice, "pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "small.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "compressed" in _refused(tmp_path / "small.pt2", "pt2", LoadFailed)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("format_", ["pt2", "state_dict"])
def test_torchscript_is_refused_in_words(format_: str, tmp_path: Path) -> None:
    """An archive of TorchScript, and a live script, are refused with what to register in their place."""
    script: Any = torch.jit.trace(MLP, torch.zeros(2, 6))  # type: ignore[no-untyped-call]  # PyTorch's
    path = tmp_path / ("model.pt2" if format_ == "pt2" else "model.pt")
    torch.jit.save(script, path)
    assert "TorchScript" in _refused(path, format_, LoadFailed)
    with pytest.raises(InvalidInput, match="TorchScript"):
        _saved(tmp_path, script)


# -- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:999", "mps", "tpu"])
def test_a_device_that_is_not_there_is_a_load_error(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each format says in words that it cannot run where it was asked to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for options in ({}, {"factory": FACTORY}):
        saved = _saved(tmp_path, **options)
        with pytest.raises(LoadFailed, match=device):
            FRAMEWORK.load(
                saved.path, saved.format, saved.load_options, Runtime(device=device, factories=TRUSTED.factories)
            )


class Small:
    """Pretends to be a device whose memory holds a few rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sizes: list[int] = []
        self.freed = 0

    def run(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        self.sizes.append(len(columns["x"]))
        if self.sizes[-1] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"output": columns["x"] * 2, "other": columns["x"][:, 0]}

    def free(self) -> None:
        self.freed += 1


def test_a_batch_that_does_not_fit_is_halved() -> None:
    """Rows come back whole and in order, and what did not fit once is never tried again."""
    small = Small(20)
    halving = Halving(small.run, torch.OutOfMemoryError, small.free)
    outputs = halving({"x": MATRIX})
    assert np.array_equal(outputs["output"], MATRIX * 2)
    assert np.array_equal(outputs["other"], MATRIX[:, 0])
    assert small.sizes == [64, 32, 16, 16, 16, 16]
    assert small.freed == 2
    small.sizes.clear()
    halving({"x": MATRIX[:33]})
    halving({"x": MATRIX[:5]})
    assert small.sizes == [16, 16, 1, 5]


def test_a_single_row_that_does_not_fit_fails_in_words() -> None:
    """When not even one row fits, there is nothing left to halve."""
    small = Small(0)
    with pytest.raises(InferenceFailed, match="single row"):
        Halving(small.run, torch.OutOfMemoryError, small.free)({"x": MATRIX[:5]})
    assert small.sizes == [5, 3, 2, 1]


def test_a_model_halves_its_batches() -> None:
    """A module that runs out of memory answers all the same."""

    def greedy(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    model = FRAMEWORK.wrap(Returns(greedy), {})
    assert np.array_equal(_answer(model, {"x": MATRIX}), MATRIX)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: copies and streams are not tested")


@NO_GPU
@pytest.mark.parametrize("factory", [None, FACTORY])
def test_a_gpu_answers_as_the_cpu_does(factory: str | None, tmp_path: Path) -> None:
    """On a GPU every format gives the answers of the CPU, for batches of several sizes."""
    saved = _saved(tmp_path, factory=factory)
    runtime = Runtime(device="cuda", factories=TRUSTED.factories)
    model = FRAMEWORK.load(saved.path, saved.format, saved.load_options, runtime)
    for rows in (1, 2, 7, 64):
        assert np.allclose(_answer(model, {"x": MATRIX[:rows]}), _bare(MLP, MATRIX[:rows]), atol=1e-4)


# -- compiling ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: torch.compile cannot make kernels for a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when its compiler is imported
@pytest.mark.parametrize("factory", [None, FACTORY])
def test_a_compiled_model_answers_as_the_bare_one(
    factory: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compile=True, every batch size is answered, within the rounding of other kernels."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    saved = _saved(tmp_path, factory=factory)
    runtime = Runtime(compile=True, factories=TRUSTED.factories)
    model = FRAMEWORK.load(saved.path, saved.format, saved.load_options, runtime)
    for rows in (1, 2, 7, 64):
        assert np.allclose(_answer(model, {"x": MATRIX[:rows]}), _bare(MLP, MATRIX[:rows]), atol=1e-5)


def test_a_compiler_that_fails_is_a_load_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile cannot do here is told at load, not at the first request."""

    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    saved = _saved(tmp_path)
    with pytest.raises(LoadFailed, match=r"compile failed.*no compiler.*C\+\+ compiler"):
        FRAMEWORK.load(saved.path, saved.format, saved.load_options, Runtime(compile=True))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_model_that_answers_one_size_of_batch_is_refused(tmp_path: Path, rows: int) -> None:
    """A squeeze that is right for the example, and wrong for one row or for many, is found before the version is."""

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answers: torch.Tensor = self.linear(x)
            return answers.squeeze() if rows > 1 else answers.mean(dim=0, keepdim=True)

    with (
        ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry,
        pytest.raises(InvalidInput, match=rf"model: it answers the example's {rows} rows, and not "),
    ):
        registry.register("m", "1", Squeezed(), example=np.ones((rows, 3), "float32"))
