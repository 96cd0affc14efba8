"""The ONNX adapter: a model is one file, and the file holds all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modelserve.adapters.frameworks.onnx import graph, session
from modelserve.adapters.frameworks.onnx.feeds import bind
from modelserve.adapters.frameworks.onnx.model import OnnxModel
from modelserve.contents import contents
from modelserve.errors import InvalidInput, LoadFailed
from modelserve.ports import SavedModel
from modelserve.types import SAFE, Columns, FrameworkName, Json, Runtime

_FORMAT: Final = "onnx"


class OnnxFramework:
    """The ONNX adapter of :class:`modelserve.ports.Framework`."""

    name: FrameworkName = "onnx"

    def save(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns | None = None) -> SavedModel:
        """Write a ``ModelProto``, or take the file at a path as it is.

        Raises ``InvalidInput`` naming the input that does not fit the graph, or what makes the graph unservable, and
        ``LoadError`` for a file that is no ONNX model or not the whole of one.
        """
        _check_options(options)
        if isinstance(model, str | Path):
            path = Path(model)
        else:
            path = folder / "model.onnx"
            path.write_bytes(graph.serialized(model))
        written = graph.parse(path.read_bytes())
        graph.check(written)
        if example is not None:
            bind(graph.inputs_of(written), example, graph.column_names(graph.metadata_of(written)))
        return SavedModel(path, _FORMAT, {})

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> OnnxModel:  # noqa: ARG002  # it needs none
        """Make a ``ModelProto`` answer batches."""
        return OnnxModel(session.open_session(graph.serialized(model), SAFE))

    def load(self, path: Path, format: str, load_options: Mapping[str, Json], runtime: Runtime = SAFE) -> OnnxModel:  # noqa: A002, ARG002
        """Read a graph, and prepare it to run on the device."""
        if format != _FORMAT:
            raise LoadFailed(f"ONNX has no format {format!r}")
        if runtime.compile:
            raise LoadFailed("ONNX Runtime optimises every graph that it loads: leave out ModelOptions(compile=True)")
        data = contents(path, runtime.sha256)
        graph.parse(data)
        return OnnxModel(session.open_session(data, runtime))


def _check_options(options: Mapping[str, Json]) -> None:
    if options.get("method", "predict") not in {None, "predict"}:
        raise InvalidInput("method", "a graph has no methods: leave it out")
    if options.get("format", _FORMAT) not in {None, _FORMAT}:
        raise InvalidInput("format", f"ONNX has no format {options['format']!r}; leave it out")
    if options.get("trusted"):
        raise InvalidInput("trusted", "it is for scikit-learn; nothing of a graph has to be trusted by name")
    if options.get("factory"):
        raise InvalidInput("factory", "a graph is saved whole; a factory is for PyTorch weights")
