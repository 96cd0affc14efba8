"""The format ``pt2``: a program that torch.export has traced, with its weights. It needs none of the user's code."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.archives import read_archive
from modelserve.adapters.frameworks.pytorch.calls import KEYWORDS, Callee, arguments, arranged, exporting
from modelserve.adapters.frameworks.pytorch.devices import find_device
from modelserve.adapters.frameworks.pytorch.model import device_in_use, evaluating
from modelserve.adapters.frameworks.pytorch.safety import check_program
from modelserve.adapters.frameworks.pytorch.tensors import Tensors, tensor_of
from modelserve.adapters.frameworks.pytorch.weights import on_cpu
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.types import Columns, Json, Runtime, row_count

INSTEAD: Final = "register the weights instead, with factory='package.module:callable' and format='safetensors'"
_TRACED_ROWS: Final = 2  # tracing takes a batch of one for a batch that is always of one
_TRIED_ROWS: Final = (1, 3)
_NOTES: Final = ("custom", "from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")


class Pt2:
    """Networks as exported programs, the default."""

    name = "pt2"
    suffixes: tuple[str, ...] = (".pt2",)

    def write(self, model: Any, path: Path, call: str | None, example: Columns | None) -> None:
        """Export a module with any number of rows, or write a program that was exported already."""
        torch = plugins.require("torch")
        if isinstance(model, torch.export.ExportedProgram):
            program = model
        elif example is None or call is None or not row_count(example):
            raise InvalidInput("example", "torch.export traces a model on rows that it takes; pass example=X[:4]")
        else:
            program = _exported(on_cpu(model), call, example)
            _drop_notes(program)
        if call is not None and example is not None:
            try_other_sizes(Callee.of_program(program), call, example)
        buffer = io.BytesIO()
        try:
            with exporting:
                torch.export.save(program, buffer)
        except Exception as error:
            raise InvalidInput("model", f"torch.export cannot write it: {_first_line(error)}; {INSTEAD}") from error
        path.write_bytes(buffer.getvalue())
        try:
            with exporting:
                check_program(*read_archive(path))
        except ArtifactUnsafe as error:
            raise InvalidInput("model", f"what torch.export makes of it would not be loaded: {error}") from error

    def read(self, path: Path, load_options: Mapping[str, Json], runtime: Runtime) -> Callee:  # noqa: ARG002
        """Read a program that passed the check, and move it to its device."""
        torch = plugins.require("torch")
        device = find_device(runtime.device)
        data, names = read_archive(path, runtime.sha256)
        with exporting:
            check_program(data, names)
        try:
            with exporting:
                program = torch.export.load(io.BytesIO(data))
                _drop_notes(program)
                if _lies_elsewhere(program, device):
                    # A program names devices in its nodes too: moving the weights alone would leave those behind.
                    program = plugins.require("torch.export.passes").move_to_device_pass(program, str(device))
                return Callee.of_program(program)
        except Exception as error:
            raise LoadFailed(
                f"PyTorch {torch.__version__} cannot load the program: {type(error).__name__}: {_first_line(error)}; a "
                "program is read by the release of PyTorch that wrote it, or a close one"
            ) from error


def _lies_elsewhere(program: Any, device: Any) -> bool:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return device.type != "cpu" or any(tensor.device != device for tensor in tensors)


def _exported(module: Any, call: str, example: Columns) -> Any:
    torch = plugins.require("torch")
    args, kwargs = arguments(call, _tensors(call, example, max(_TRACED_ROWS, row_count(example))))
    shapes = _shapes(inspect.signature(module.forward), call, args, kwargs)
    with evaluating(module), torch.no_grad(), warnings.catch_warnings():
        # PyTorch warns of how a model is written; whether the program answers as the model does is proven afterwards.
        warnings.simplefilter("ignore")
        try:
            with exporting:
                return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            reason = f"torch.export cannot trace it for any number of rows ({_first_line(error)})"
            raise InvalidInput("model", f"{reason}; {INSTEAD}") from error


def _shapes(signature: inspect.Signature, call: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Say that the first dimension of every input is the number of rows."""
    first = {0: plugins.require("torch").export.Dim("rows")}
    if call == KEYWORDS:
        return dict.fromkeys(kwargs, first)
    kinds = [each.kind for each in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return (first,) * len(args)
    named = min(kinds.index(inspect.Parameter.VAR_POSITIONAL), len(args))
    return (*[first] * named, (first,) * (len(args) - named))


def try_other_sizes(callee: Callee, call: str, example: Columns) -> None:
    """Raise ``InvalidInput`` unless an exported program takes batches of other sizes than the example's."""
    torch = plugins.require("torch")
    device = device_in_use(callee.module)
    for rows in _TRIED_ROWS:
        tensors = {name: tensor.to(device) for name, tensor in _tensors(call, example, rows).items()}
        args, kwargs = arguments(call, tensors)
        try:
            with torch.inference_mode():
                callee.function(*args, **kwargs)
        except Exception as error:
            problem = f"the exported program does not take a batch of {rows} ({_first_line(error)})"
            raise InvalidInput("model", f"{problem}; export it with a dynamic first dimension, or {INSTEAD}") from error


def _tensors(call: str, example: Columns, rows: int) -> Tensors:
    """Return as many rows as that, taken from the example again and again."""
    arrays = arranged(call, example)
    return {name: tensor_of(np.resize(array, (rows, *array.shape[1:]))) for name, array in arrays.items()}


def _drop_notes(program: Any) -> None:
    """Forget which line of which file a node came from: it tells of another machine, and is pasted into kernels."""
    graph_module = plugins.require("torch").fx.GraphModule
    for module in program.graph_module.modules():
        if isinstance(module, graph_module):
            for node in module.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
