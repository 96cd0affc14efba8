"""The format ``saved_model``: a folder with graphs and their variables. A graph can read and write files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from modelserve.adapters.frameworks.tensorflow.endpoint import Endpoint, signature_name
from modelserve.adapters.frameworks.tensorflow.inputs import Described, bind
from modelserve.adapters.frameworks.tensorflow.model import explained, spec_of
from modelserve.adapters.frameworks.tensorflow.outputs import named
from modelserve.adapters.frameworks.tensorflow.runtime import tensorflow
from modelserve.adapters.frameworks.tensorflow.wording import brief
from modelserve.errors import InvalidInput, LoadFailed

NAME: Final = "saved_model"
_PROGRAM: Final = "saved_model.pb"


def write(model: Any, endpoint: Endpoint, method: str, columns: Described | None, folder: Path) -> Path:
    """Write a model with the one signature that answers, its number of rows open.

    Raises ``InvalidInput`` for inputs that do not fit, and for a model that TensorFlow cannot save.
    """
    if columns is None:
        raise InvalidInput("example", "a SavedModel records how it is called; pass example=X[:4]")
    inputs = endpoint.inputs_for(columns)
    bind(inputs, columns)
    for each in inputs:
        if not each.name.isidentifier():
            raise InvalidInput(each.name, "a SavedModel names its inputs by letters, digits and underscores; rename it")
    tf = tensorflow()
    path = folder / NAME
    owner = tf.Module()
    owner.model = model  # what the graph uses has to hang on what is saved

    as_is = tf.autograph.experimental.do_not_convert(named)

    def answer(**tensors: Any) -> Any:
        return as_is(endpoint.call(tensors))

    with explained():
        graph = tf.function(answer).get_concrete_function(**{each.name: spec_of(each, each.name) for each in inputs})
        tf.saved_model.save(owner, str(path), signatures={signature_name(method): graph})
    _remove_empty_folders(path)
    return path


def is_saved_model(path: Path) -> bool:
    """Whether a folder is a SavedModel."""
    return (path / _PROGRAM).is_file()


def check(path: Path) -> None:
    """Look at a folder without loading it. Raises ``LoadFailed`` for what is no SavedModel."""
    if not is_saved_model(path):
        raise LoadFailed(f"the artifact is no SavedModel: it is not a folder with a {_PROGRAM}")


def read(path: Path, device: str) -> Any:
    """Read a SavedModel, whose initialisers run with it. Raises ``LoadFailed``."""
    tf = tensorflow()
    try:
        with tf.device(device):
            return tf.saved_model.load(str(path))
    except Exception as error:
        raise LoadFailed(f"TensorFlow cannot read the artifact: {brief(error)}") from error


def _remove_empty_folders(path: Path) -> None:
    """Leave what the artifact store keeps, files alone, so that what is proven at registration is what is stored."""
    for folder in path.iterdir():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
