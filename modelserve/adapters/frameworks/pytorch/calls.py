"""How the inputs of a signature become the arguments of ``forward``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from modelserve.adapters.frameworks.pytorch.tensors import Tensors
from modelserve.errors import InvalidInput
from modelserve.types import Array, Columns

KEYWORDS: Final = "keywords"
POSITIONAL: Final = "positional"
MATRIX: Final = "matrix"

_BY_NAME: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NO_LIMIT: Final = 1 << 30
_SAME_ROWS: Final = re.compile(r"L\['\w+'\]\.size\(\)\[0\] == L\['\w+'\]\.size\(\)\[0\]")

exporting: Final = threading.RLock()
"""Held by whoever checks, reads, writes or unpacks an exported program.

torch.export does so through globals of its own; so does ``ast.parse``, which both the check and torch.export call: in
CPython 3.11 it counts its depth for the whole interpreter, and a thread that comes between gets a ``SystemError``
(python/cpython#106905).
"""


@dataclasses.dataclass(frozen=True)
class Callee:
    """What is called with tensors, the parameters that it has, and the module whose weights and mode count."""

    function: Callable[..., Any]
    signature: inspect.Signature
    module: Any

    @classmethod
    def of_module(cls, module: Any) -> Callee:
        """The ``forward`` of a live module, called the way PyTorch calls it: through the module."""
        return cls(module, inspect.signature(module.forward), module)

    @classmethod
    def of_program(cls, program: Any) -> Callee:
        """An exported program."""
        function = _Program(program)
        return cls(function, function.signature, function.module)

    def through(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callee:
        """Return the same with its function compiled: a program without its guards, if these can be spared."""
        unguarded = self.function.unguarded if isinstance(self.function, _Program) else None
        return dataclasses.replace(self, function=compiler(unguarded or self.function))


class _Program:
    """Calls an exported program, which insists on the split into positional and keyword arguments of its export.

    The program comes with guards: checks in Python that its inputs are what it was traced for, which take longer than a
    small network. Where it takes any number of rows, they are made once for each type and shape of a row.
    """

    def __init__(self, program: Any) -> None:
        with exporting:
            self.module = program.module()
            self.unguarded = program.module(check_guards=False).forward if _takes_any_rows(program) else None
        self.signature = inspect.signature(self.module.forward)
        self._names = list(self.signature.parameters)
        self._places = program.call_spec.in_spec.child(0).num_children
        self._known: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self._names):
            given = self.signature.bind(*args, **kwargs).arguments
            args = tuple(given[name] for name in self._names)
        kind = tuple((tensor.dtype, tensor.shape[1:]) for tensor in args)
        if self.unguarded is not None and kind in self._known:
            return self.unguarded(*args)
        places, named = args[: self._places], zip(self._names[self._places :], args[self._places :], strict=True)
        answer = self.module(*places, **dict(named))
        self._known.add(kind)
        return answer


def _takes_any_rows(program: Any) -> bool:
    """Whether a program asks nothing of its open sizes, but that its inputs have the same number of rows."""
    unbounded = all(each.lower <= 1 and str(each.upper) == "int_oo" for each in program.range_constraints.values())
    guards = getattr(program, "_guards_code", None)  # where a release has none, they are not left out
    asks_nothing = guards is not None and all(map(_SAME_ROWS.fullmatch, guards))
    return unbounded and asks_nothing and all(map(_has_open_rows, _inputs(program)))


def _inputs(program: Any) -> list[Any]:
    names = set(program.graph_signature.user_inputs)
    return [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _has_open_rows(value: Any) -> bool:
    shape: Any = getattr(value, "shape", ())
    return bool(shape) and not isinstance(shape[0], int)


def choose(signature: inspect.Signature, columns: Columns) -> str:
    """Choose the way to call a function that has this signature with these inputs.

    By keywords where the inputs are parameters of it by name; as one matrix ``(rows, inputs)`` where it takes a sole
    argument and the inputs are several scalars of one dtype; else in the order of the inputs. Raises ``InvalidInput``
    when it cannot be called with them.
    """
    parameters = list(signature.parameters.values())
    required = {each.name for each in parameters if each.default is each.empty and each.kind in {*_BY_NAME, *_BY_PLACE}}
    if required <= columns.keys() <= {each.name for each in parameters if each.kind in _BY_NAME}:
        return KEYWORDS
    by_place = [each for each in parameters if each.kind in _BY_PLACE]
    keyword_only = required - {each.name for each in by_place}
    if len(required) == 1 == len(by_place) and not keyword_only and len(columns) > 1:
        _check_scalars(columns)
        return MATRIX
    many = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    most = _NO_LIMIT if many else len(by_place)
    if keyword_only or not len(required) <= len(columns) <= most:
        raise InvalidInput(
            "example",
            f"the model takes ({', '.join(signature.parameters)}), the example gives ({', '.join(columns)}); name the "
            "inputs as the parameters, or give as many, in their order",
        )
    _check_places(columns, [each.name for each in by_place if not many])
    return POSITIONAL


def arranged(call: str, columns: Columns) -> dict[str, Array]:
    """Return the arrays that are sent to the device: the columns, or all of them stacked to one matrix."""
    if call == MATRIX:
        return {MATRIX: np.stack(list(columns.values()), axis=1)}
    return dict(columns)


def arguments(call: str, tensors: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of one call."""
    return ((), dict(tensors)) if call == KEYWORDS else (tuple(tensors.values()), {})


def _check_places(columns: Columns, parameters: Sequence[str]) -> None:
    """Refuse an input that has the name of one parameter and the place of another."""
    for name, parameter in zip(columns, parameters, strict=False):
        if name != parameter and name in parameters:
            problem = f"it would go to the parameter {parameter!r} by its place, and to {name!r} by its name"
            raise InvalidInput(name, f"{problem}; name all inputs as the parameters: {', '.join(parameters)}")


def _check_scalars(columns: Columns) -> None:
    first = next(iter(columns.values()))
    for name, column in columns.items():
        if column.ndim != 1:
            raise InvalidInput(name, "the model takes one argument: give it one array, or only scalars to be stacked")
        if column.dtype != first.dtype:
            raise InvalidInput(
                name,
                f"scalars are stacked to one matrix, so they need one dtype, and it is {column.dtype} beside "
                f"{first.dtype}; convert the example, for instance with example.astype('float32')",
            )
