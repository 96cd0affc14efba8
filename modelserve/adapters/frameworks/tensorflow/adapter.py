"""The TensorFlow adapter: which format a model is kept in, and what of it requests call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modelserve.adapters.frameworks.tensorflow import keras_zip, saved_model
from modelserve.adapters.frameworks.tensorflow.endpoint import (
    PREDICT,
    Endpoint,
    is_keras,
    live_endpoint,
    signature_endpoint,
)
from modelserve.adapters.frameworks.tensorflow.inputs import described, from_json, to_json
from modelserve.adapters.frameworks.tensorflow.model import TensorFlowModel
from modelserve.adapters.frameworks.tensorflow.runtime import device_name
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed
from modelserve.ports import SavedModel
from modelserve.types import SAFE, Columns, FrameworkName, Json, Runtime

_FORMATS: Final = (keras_zip.NAME, saved_model.NAME)
_LEGACY: Final = (".h5", ".hdf5")


class TensorFlowFramework:
    """The TensorFlow adapter of :class:`modelserve.ports.Framework`."""

    name: FrameworkName = "tensorflow"

    def save(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns | None = None) -> SavedModel:
        """Write a Keras model or a ``tf.Module``, or take the file or folder at a path as it is.

        ``options``: ``method`` (default ``predict``: the call of the model, or the signature ``serving_default``; else
        a function of a ``tf.Module``, or another signature) and ``format`` (``keras`` or ``saved_model``; by default
        the first for a Keras model). Raises ``InvalidInput`` naming the column of ``example`` whose type is not the
        model's own, and ``ArtifactUnsafe`` for a Keras model with a Lambda layer.
        """
        _refuse_idle(options)
        method = options.get("method") or PREDICT
        load_options: dict[str, Json] = {"method": method}
        if example is not None:
            load_options["columns"] = to_json(described(example))
        given_as_path = isinstance(model, str | Path)
        name = _format(options.get("format") or (_format_of(Path(model)) if given_as_path else _default_format(model)))
        if name == keras_zip.NAME and method != PREDICT:
            raise InvalidInput("method", f"a model in the format 'keras' answers by {PREDICT!r} alone, not {method!r}")
        path = Path(model) if given_as_path else _written(model, name, load_options, folder)
        _check(path, name)
        return SavedModel(path, name, load_options, runs_code=True)

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> TensorFlowModel:
        """Make a Keras model (in inference mode) or a function of a ``tf.Module`` answer batches, where it is."""
        return _model(live_endpoint(model, load_options.get("method", PREDICT)), load_options)

    def load(
        self,
        path: Path,
        format: str,  # noqa: A002
        load_options: Mapping[str, Json],
        runtime: Runtime = SAFE,
    ) -> TensorFlowModel:
        """Read a model where that is allowed; until then neither the file nor TensorFlow is touched."""
        if format not in _FORMATS:
            raise LoadFailed(f"TensorFlow has no format {format!r}")
        if not runtime.allow_code:
            raise ArtifactUnsafe(
                f"the artifact holds a program of its own (format {format!r}), so it is refused by default; if you "
                "trust whoever registered it, serve the model with ModelOptions(allow_code=True)"
            )
        _check(path, format)
        try:
            device = device_name(runtime.device)
            endpoint = _read(path, format, load_options.get("method", PREDICT), device)
            return _model(endpoint, load_options, device=device, compiled=runtime.compile)
        except InvalidInput as error:
            raise LoadFailed(str(error)) from error


def _model(endpoint: Endpoint, load_options: Mapping[str, Json], **runtime: Any) -> TensorFlowModel:
    columns = load_options.get("columns")
    return TensorFlowModel(endpoint, None if columns is None else from_json(columns), **runtime)


def _written(model: Any, name: str, load_options: Mapping[str, Json], folder: Path) -> Path:
    """Write a live model in a format, once it is known to take the example."""
    method = load_options["method"]
    endpoint = live_endpoint(model, method)
    if name == keras_zip.NAME:
        if not is_keras(model):
            raise InvalidInput("format", f"'keras' holds Keras models, no {type(model).__name__}; use 'saved_model'")
        _model(endpoint, load_options)
        return keras_zip.write(model, folder)
    columns = load_options.get("columns")
    return saved_model.write(model, endpoint, method, None if columns is None else from_json(columns), folder)


def _read(path: Path, name: str, method: str, device: str) -> Endpoint:
    if name == keras_zip.NAME:
        return live_endpoint(keras_zip.read(path, device), PREDICT)
    return signature_endpoint(saved_model.read(path, device), method)


def _check(path: Path, name: str) -> None:
    (keras_zip if name == keras_zip.NAME else saved_model).check(path)


def _format(name: str) -> str:
    if name not in _FORMATS:
        raise InvalidInput("format", f"TensorFlow has no format {name!r}; use {', '.join(map(repr, _FORMATS))}")
    return name


def _default_format(model: Any) -> str:
    return keras_zip.NAME if is_keras(model) else saved_model.NAME


def _format_of(path: Path) -> str:
    if saved_model.is_saved_model(path):
        return saved_model.NAME
    if path.suffix == keras_zip.SUFFIX:
        return keras_zip.NAME
    if path.suffix in _LEGACY:
        problem = f"{path.name} is of Keras's old format; load it with keras.saving.load_model and register the model"
        raise InvalidInput("format", problem)
    raise InvalidInput("format", f"cannot tell the format of {path.name}; pass format= ({', '.join(_FORMATS)})")


def _refuse_idle(options: Mapping[str, Json]) -> None:
    if options.get("factory"):
        raise InvalidInput("factory", "a TensorFlow model is saved whole; a factory is for PyTorch weights")
    if options.get("trusted"):
        raise InvalidInput("trusted", "it is for scikit-learn; whether TensorFlow's formats are loaded is up to "
                           "ModelOptions(allow_code=True) where the model is served")  # fmt: skip
