"""Stages of a model put together to one graph that takes the user's inputs and gives the estimator's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.types import SOLE_OUTPUT, Array, Columns

_OLDEST_OPSET: Final = 13  # of the operators used here
_NEWEST_IR: Final = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A converted step: a ``ModelProto`` of one input, or of one per column, and which of its outputs goes on."""

    model: Any
    place: int


class _Assembly:
    """A graph that grows at its end. ``ends`` are the names of what it has computed so far."""

    def __init__(self, inputs: Columns) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.opsets = {"": _OLDEST_OPSET}
        self.ends = list(inputs)

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add one node; return the name of its output."""
        helper = plugins.require("onnx.helper")
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}:{operator}", **attributes))
        return output

    def add_constant(self, name: str, value: Array) -> str:
        """Add a constant; return its name."""
        self.constants.append(plugins.require("onnx.numpy_helper").from_array(value, name))
        return name

    def add_stage(self, stage: Stage, prefix: str) -> None:
        """Add a stage, and cast what there is so far to what it takes."""
        model = plugins.require("onnx.compose").add_prefix(stage.model, prefix)
        takes = [(each.name, each.type.tensor_type.elem_type) for each in model.graph.input]
        if len(takes) == 1 and len(self.ends) > 1:
            name, kind = takes[0]
            parts = [self._cast(end, kind, f"{name}:{i}") for i, end in enumerate(self.ends)]
            self.add("Concat", parts, name, axis=1)
        else:
            for end, (name, kind) in zip(self.ends, takes, strict=True):
                self._cast(end, kind, name)
        self.nodes += model.graph.node
        self.constants += model.graph.initializer
        for each in model.opset_import:
            self.opsets[each.domain] = max(each.version, self.opsets.get(each.domain, 0))
        self.ends = [model.graph.output[stage.place].name]

    def _cast(self, end: str, kind: int, output: str) -> str:
        if kind == plugins.require("onnx").TensorProto.STRING:
            return self.add("Identity", [end], output)
        return self.add("Cast", [end], output, to=kind)

    def finish(self, wanted: Array, *, is_whole: bool, method: str) -> int:
        """Bring the end to the form of the estimator's own answers; return its element type."""
        (end,) = self.ends
        takes_last = method == "decision_function"
        if wanted.ndim == 1 and takes_last:
            end = self.add("Gather", [end, self.add_constant("answer/place", np.array(-1))], "answer/flat", axis=1)
        elif wanted.ndim == 1:
            shape = self.add_constant("answer/shape", np.array([-1]))
            end = self.add("Reshape", [end, shape], "answer/flat")
        kind = _element_type(wanted, is_whole=is_whole)
        if method == "predict_proba":  # the sums of float32 can be a last digit beyond what is a probability
            end = self._cast(end, kind, "answer/scores")
            bounds = [self.add_constant(f"answer/{i}", np.array(i, wanted.dtype)) for i in (0, 1)]
            end = self.add("Clip", [end, *bounds], "answer/clipped")
        self.ends = [self._cast(end, kind, SOLE_OUTPUT)]
        return kind


def assemble(stages: Sequence[Stage], inputs: Columns, wanted: Array, method: str) -> Any:
    """Return a ``ModelProto`` that takes columns like ``inputs`` and answers in the form of ``wanted``.

    A row of several values that stands for a single one is the value itself, or of a ``decision_function`` the last of
    them: the score of the second of two classes. Only what leads to the answer is kept.
    """
    helper = plugins.require("onnx.helper")
    made = _Assembly(inputs)
    for i, stage in enumerate(stages):
        made.add_stage(stage, f"stage{i}/")
    last = stages[-1].model.graph.output[stages[-1].place]
    is_whole = last.type.tensor_type.elem_type == plugins.require("onnx").TensorProto.INT64
    kind = made.finish(wanted, is_whole=is_whole, method=method)
    output = helper.make_tensor_value_info(SOLE_OUTPUT, kind, [None, *wanted.shape[1:]])
    takes = [
        helper.make_tensor_value_info(name, _element_type(column, is_whole=True), [None, *(column.shape[1:] or (1,))])
        for name, column in inputs.items()
    ]
    nodes, constants = _needed(made, SOLE_OUTPUT)
    graph = helper.make_graph(nodes, "converted", takes, [output], constants)
    opsets = [helper.make_opsetid(domain, version) for domain, version in made.opsets.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_NEWEST_IR, producer_name="modelserve")


def _element_type(array: Array, *, is_whole: bool) -> int:
    """Return ONNX's number for the type of an array; a whole number is never made of what is none."""
    if array.dtype.kind in "OU":
        return int(plugins.require("onnx").TensorProto.STRING)
    dtype = np.dtype("float64") if array.dtype.kind in "iu" and not is_whole else array.dtype
    return int(plugins.require("onnx.helper").np_dtype_to_tensor_dtype(dtype))


def _needed(made: _Assembly, output: str) -> tuple[list[Any], list[Any]]:
    wanted, nodes = {output}, []
    for node in reversed(made.nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            wanted.update(_used_inside(node))
            nodes.append(node)
    return nodes[::-1], [each for each in made.constants if each.name in wanted]


def _used_inside(node: Any) -> set[str]:
    """Return the names that the bodies of a loop or a branch take from around them."""
    names: set[str] = set()
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names.update(inner.input)
            names |= _used_inside(inner)
    return names
