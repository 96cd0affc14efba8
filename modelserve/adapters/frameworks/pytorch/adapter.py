"""The PyTorch adapter: which format a network is kept in, how it is called, and what it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.calls import Callee, choose
from modelserve.adapters.frameworks.pytorch.compiling import compiled
from modelserve.adapters.frameworks.pytorch.export import Pt2, try_other_sizes
from modelserve.adapters.frameworks.pytorch.formats import Format
from modelserve.adapters.frameworks.pytorch.model import PyTorchModel
from modelserve.adapters.frameworks.pytorch.tensors import refuse_strings
from modelserve.adapters.frameworks.pytorch.weights import SafeTensors, StateDict
from modelserve.errors import InvalidInput, LoadFailed, ModelServeError
from modelserve.ports import SavedModel
from modelserve.types import SAFE, Columns, FrameworkName, Json, Runtime

_ALL: Final[tuple[Format, ...]] = (Pt2(), SafeTensors(), StateDict())
_FORMATS: Final = {each.name: each for each in _ALL}
_METHODS: Final = ("predict", "forward")


class PyTorchFramework:
    """The PyTorch adapter of :class:`modelserve.ports.Framework`."""

    name: FrameworkName = "pytorch"

    def save(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns | None = None) -> SavedModel:
        """Write a module or an exported program, or take the file at a path as it is.

        ``options``: ``method`` (``predict`` or ``forward``, which both call the module), ``factory`` (what builds the
        network again: ``"package.module:callable"``), ``format`` (``pt2``, ``safetensors`` or ``state_dict``; by
        default safetensors where a factory is given, else pt2). Raises ``InvalidInput`` for a model that cannot be
        exported, and for an example that it does not take.
        """
        if (options.get("method") or _METHODS[0]) not in _METHODS:
            raise InvalidInput("method", f"a PyTorch model is called through forward; leave out {options['method']!r}")
        if options.get("trusted"):
            raise InvalidInput(
                "trusted", "it is for scikit-learn; nothing of a PyTorch model has to be trusted by name"
            )
        factory = options.get("factory")
        if isinstance(model, str | Path):
            path = Path(model)
            chosen = _format(options.get("format") or _name_by_suffix(path), factory)
            runtime = Runtime(factories=(factory,) if factory else ())
            callee = chosen.read(path, {"factory": factory}, runtime)
            call = _proven_call(callee, example, live=False)
            if chosen.name == Pt2.name and example is not None and call is not None:
                try_other_sizes(callee, call, example)
        else:
            chosen = _format(options.get("format") or (SafeTensors.name if factory else Pt2.name), factory)
            path = folder / f"model{chosen.suffixes[0]}"
            call = _proven_call(_callee(model), example, live=True)
            chosen.write(model, path, call, example)
        load_options = {"call": call, "factory": factory, "inputs": _inputs(example)}
        return SavedModel(path, chosen.name, {name: value for name, value in load_options.items() if value is not None})

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> PyTorchModel:
        """Make a live module or exported program answer batches, in eval mode for the time of each."""
        return PyTorchModel(_callee(model), load_options.get("call"), live=True)

    def load(self, path: Path, format: str, load_options: Mapping[str, Json], runtime: Runtime = SAFE) -> PyTorchModel:  # noqa: A002
        """Read a network by the one reader of its format, move it to its device, and compile it where that is asked."""
        if format not in _FORMATS:
            raise LoadFailed(f"PyTorch has no format {format!r}")
        callee = _FORMATS[format].read(path, load_options, runtime)
        call = load_options.get("call")
        return compiled(callee, call, load_options.get("inputs")) if runtime.compile else PyTorchModel(callee, call)


def _format(name: str, factory: Json) -> Format:
    found = _FORMATS.get(name)
    if found is None:
        raise InvalidInput("format", f"PyTorch has no format {name!r}; use {', '.join(map(repr, _FORMATS))}")
    if name == Pt2.name and factory:
        raise InvalidInput("factory", "an exported program brings its network along; a factory is for weights alone")
    if name != Pt2.name and not factory:
        problem = "weights need something that builds the network for them: factory='package.module:callable'"
        raise InvalidInput("factory", problem)
    return found


def _name_by_suffix(path: Path) -> str:
    for each in _FORMATS.values():
        if path.suffix in each.suffixes:
            return each.name
    raise InvalidInput("format", f"cannot tell the format of {path.name}; pass format= ({', '.join(_FORMATS)})")


def _callee(model: Any) -> Callee:
    torch = plugins.require("torch")
    if any(cls.__module__ == "torch.jit._script" for cls in type(model).__mro__):  # touching torch.jit would warn
        raise InvalidInput("model", "TorchScript is deprecated by PyTorch; register the module it was made from")
    if isinstance(model, torch.export.ExportedProgram):
        return Callee.of_program(model)
    if isinstance(model, torch.nn.Module):
        return Callee.of_module(model)
    problem = f"a {type(model).__name__} is neither a torch.nn.Module nor a torch.export.ExportedProgram"
    raise InvalidInput("model", problem)


def _proven_call(callee: Callee, example: Columns | None, *, live: bool) -> str | None:
    """Choose the way to call a model, and try it out on the example."""
    if example is None:
        return None
    refuse_strings(example)
    call = choose(callee.signature, example)
    try:
        PyTorchModel(callee, call, live=live).infer(example)
    except ModelServeError as error:
        raise InvalidInput("example", f"the model does not answer it: {error}") from error
    except Exception as error:
        _refuse_other_precision(callee.module, example, error)
        given = ", ".join(f"{name}: {column.dtype}{list(column.shape[1:])}" for name, column in example.items())
        problem = f"the model does not answer it ({given}): {type(error).__name__}: {error}"
        raise InvalidInput("example", problem) from error
    return call


def _refuse_other_precision(module: Any, example: Columns, error: Exception) -> None:
    """Say it by name when a model failed on floats of another precision than its weights have: the usual slip."""
    precisions = {str(each.dtype).removeprefix("torch.") for each in module.parameters() if each.is_floating_point()}
    if len(precisions) != 1:
        return
    wanted = precisions.pop()
    for name, column in example.items():
        if column.dtype.kind == "f" and column.dtype.name != wanted:
            problem = f"it is {column.dtype.name}, the weights of the model are {wanted}"
            raise InvalidInput(name, f"{problem}; pass it as that: example.astype({wanted!r})") from error


def _inputs(example: Columns | None) -> dict[str, Json] | None:
    """Describe the inputs, so that a compiler can be tried out before the first request."""
    if example is None:
        return None
    return {name: [np.dtype(column.dtype).name, list(column.shape[1:])] for name, column in example.items()}
