"""An ONNX file as data: whether it is one, whether it is whole, and what it takes and gives.

A graph may say that some of its numbers lie in other files, at any path. ONNX Runtime would look for them, so a file
that says so is refused before anything else reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import orjson

from modelserve import plugins
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed, describe

_DTYPES: Final = {
    "BOOL": "bool",
    "DOUBLE": "float64",
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "STRING": "object",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """An input of a graph. ``shape`` has None where a size is open, first of all for the batch; None: any shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    @property
    def rank(self) -> int | None:
        """How many dimensions it has, the batch included."""
        return None if self.shape is None else len(self.shape)


def parse(data: bytes) -> Any:
    """Return the ``ModelProto`` in a file's bytes. Raises ``LoadFailed`` when there is none that is whole."""
    model = plugins.require("onnx").ModelProto()
    try:
        model.ParseFromString(data)
    except plugins.require("google.protobuf.message").DecodeError as error:
        raise LoadFailed(f"the artifact is not an ONNX model: {error}") from error
    _require_whole(model)
    return model


def serialized(model: Any) -> bytes:
    """Return the bytes of a ``ModelProto`` that is whole. Raises ``InvalidInput`` for anything else."""
    if not isinstance(model, plugins.require("onnx").ModelProto):
        raise InvalidInput("model", f"expected an onnx.ModelProto or the path of a .onnx file, got {type(model)}")
    _require_whole(model)
    try:
        data: bytes = model.SerializeToString()
    except ValueError as error:
        raise InvalidInput("model", f"ONNX holds at most 2 GiB in one file: {error}") from error
    return data


def check(model: Any) -> None:
    """Raise ``InvalidInput`` for a graph that breaks ONNX's rules, or whose inputs or outputs cannot be served."""
    try:
        plugins.require("onnx.checker").check_model(model)
    except Exception as error:
        raise InvalidInput("model", f"the graph breaks a rule of ONNX: {first_line(error)}") from error
    for each in inputs_of(model):
        _check_batch_axis(each)
    for each in model.graph.output:
        _check_output(each)


def inputs_of(model: Any) -> list[Input]:
    """Return what a call has to give; inputs with a value of their own are left out. Raises ``InvalidInput``."""
    given = {each.name for each in model.graph.initializer}
    return [_input(each) for each in model.graph.input if each.name not in given]


def column_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a graph's metadata calls the columns of its matrix: ``feature_names``, a JSON list; else none."""
    try:
        names = orjson.loads(metadata.get("feature_names", "[]"))
    except orjson.JSONDecodeError:
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def metadata_of(model: Any) -> dict[str, str]:
    """Return the metadata of a ``ModelProto``."""
    return {each.key: each.value for each in model.metadata_props}


def first_line(error: Exception) -> str:
    """Return what a driver says went wrong, without the stack of its own that may follow."""
    return describe(error).splitlines()[0]


def _require_whole(model: Any) -> None:
    if not model.HasField("graph") or not model.ir_version:
        raise LoadFailed("the artifact is not an ONNX model: it holds no graph")
    elsewhere = next((each for each in _tensors(model) if each.data_location or each.external_data), None)
    if elsewhere is not None:
        raise ArtifactUnsafe(
            f"the graph reads {elsewhere.name!r} from another file, which is never done; put everything into the one "
            "file: onnx.save(onnx.load(path), 'model.onnx')"
        )


def _tensors(message: Any) -> Iterator[Any]:
    """Give every tensor anywhere in a message, whatever part of a model it belongs to."""
    if type(message).__name__ == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                yield from _tensors(part)


def _input(value: Any) -> Input:
    if value.type.WhichOneof("value") != "tensor_type":
        raise InvalidInput(
            value.name, "the graph takes a sequence, a map or an optional value here; only tensors can be served"
        )
    tensor = value.type.tensor_type
    name = plugins.require("onnx").TensorProto.DataType.Name(tensor.elem_type)
    if name not in _DTYPES:
        raise InvalidInput(
            value.name, f"the graph takes {name.lower()} here, which no request can carry; cast inside the graph"
        )
    shape = tuple(_size(each) for each in tensor.shape.dim) if tensor.HasField("shape") else None
    return Input(value.name, np.dtype(_DTYPES[name]), shape)


def _size(dimension: Any) -> int | None:
    size = int(dimension.dim_value) if dimension.HasField("dim_value") else -1
    return size if size >= 0 else None  # old exporters write -1 for what is open


def _check_batch_axis(given: Input) -> None:
    if given.shape == ():
        raise InvalidInput(
            given.name, "the graph takes a single value here, the same for all rows; build it in as a constant"
        )
    if given.shape is not None and given.shape[0] is not None:
        raise InvalidInput(
            given.name,
            f"the graph takes exactly {given.shape[0]} rows; export it with a dynamic batch axis (first dimension)",
        )


def _check_output(value: Any) -> None:
    kind = value.type.WhichOneof("value")
    if kind == "tensor_type":
        name = plugins.require("onnx").TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        served = name in _DTYPES
    else:
        name = (kind or "nothing known").removesuffix("_type")
        served = kind == "sequence_type" and value.type.sequence_type.elem_type.WhichOneof("value") == "map_type"
    if not served:
        raise InvalidInput(
            "model", f"the output {value.name!r} is {name.lower()}, which no answer can carry; cast it to float32"
        )
