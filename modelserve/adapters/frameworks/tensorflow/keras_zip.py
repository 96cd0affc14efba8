"""The format ``keras``: a zip of a configuration in JSON and of weights in HDF5, read by Keras in its safe mode.

The configuration names the classes that build the model and may bring functions as marshalled bytecode. Safe mode
refuses these; it was got round before, so the format counts as one that runs code all the same.
"""

from __future__ import annotations

import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from modelserve.adapters.frameworks.tensorflow.runtime import keras, tensorflow
from modelserve.adapters.frameworks.tensorflow.wording import brief
from modelserve.errors import ArtifactUnsafe, InvalidInput, LoadFailed, ModelServeError

NAME: Final = "keras"
SUFFIX: Final = ".keras"
_CONFIG: Final = "config.json"
_MEMBERS: Final = (_CONFIG, "metadata.json", "model.weights.h5")
_ASSETS: Final = "assets/"
_CONFIG_KEYS: Final = {"module", "class_name", "config"}
_FOREIGN: Final = {
    "TFSMLayer": "a layer that runs a SavedModel from elsewhere",
    "TorchModuleWrapper": "a layer that is a pickle",
    "__lambda__": "a function as bytecode (a Lambda layer)",
}
_ALWAYS_FINE: Final = 64 * 1024 * 1024  # bytes unpacked
_MOST_TIMES: Final = 50  # what is packed; Keras itself packs nothing
_T = TypeVar("_T")


def write(model: Any, folder: Path) -> Path:
    """Write a Keras model. Raises ``InvalidInput`` for one that Keras cannot save."""
    path = folder / f"model{SUFFIX}"
    keras()
    try:
        model.save(path)
    except Exception as error:
        raise InvalidInput("model", f"Keras cannot save it: {brief(error)}") from error
    return path


def check(path: Path) -> None:
    """Look at a file without loading it.

    Raises ``ArtifactUnsafe`` for what is no archive of Keras's, or brings code, and ``LoadFailed`` for a damaged one.
    """
    if not zipfile.is_zipfile(path):
        raise ArtifactUnsafe("the artifact is not a .keras file (its bytes are no zip archive); it was not opened")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive)
            config = orjson.loads(archive.read(_CONFIG))
    except ModelServeError:
        raise
    except Exception as error:
        raise LoadFailed(f"the artifact is no whole .keras file: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict) or not config.keys() >= _CONFIG_KEYS:
        raise LoadFailed(f"the artifact is no .keras file: its {_CONFIG} does not describe a model of Keras 3")
    _refuse_code(config)


def read(path: Path, device: str) -> Any:
    """Read a checked file in safe mode. Raises ``ArtifactUnsafe`` for what that refuses, else ``LoadFailed``."""
    load = keras().saving.load_model
    with tempfile.TemporaryDirectory(prefix="modelserve-") as folder:
        # Keras picks the reader by the suffix: under this one there is no other than the reader of this format.
        link = Path(folder, f"model{SUFFIX}")
        link.symlink_to(path.absolute())

        def loaded() -> Any:
            with tensorflow().device(device):
                return load(link, compile=False, safe_mode=True)

        try:
            return _in_a_thread(loaded)
        except Exception as error:
            raise _refusal(error) from error


def _in_a_thread(call: Callable[[], _T]) -> _T:
    """Call in a fresh thread: where a thread has switched safe mode off for Keras, that outweighs the argument."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  # raised again where it was asked for
            errors.append(error)

    thread = threading.Thread(target=run, name="modelserve-keras")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _check_members(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    odd = next((name for name in names if name not in _MEMBERS and not name.startswith(_ASSETS)), None)
    if odd is not None or len(set(names)) < len(names):
        what = "has members of the same name" if odd is None else f"has a member {odd!r}"
        raise ArtifactUnsafe(f"the artifact {what}, which no file written by Keras 3 has; it was not loaded")
    _refuse_bomb(archive)
    damaged = archive.testzip()
    if damaged is not None:
        raise LoadFailed(f"the artifact is damaged: {damaged} in it has a wrong checksum; register the model again")


def _refuse_bomb(archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    packed, whole = sum(each.compress_size for each in members), sum(each.file_size for each in members)
    texts = [each.file_size for each in members if each.filename.endswith(".json")]
    if whole > max(_ALWAYS_FINE, _MOST_TIMES * packed) or max(texts, default=0) > _ALWAYS_FINE:
        raise ArtifactUnsafe(
            f"the artifact would be {whole} bytes unpacked, of {packed}; weights are not packed like that, and it was "
            "not loaded"
        )


def _refuse_code(config: Any) -> None:
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if part.get("class_name") in _FOREIGN:
                raise _unsafe(_FOREIGN[part["class_name"]])
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)


def _unsafe(what: str) -> ArtifactUnsafe:
    return ArtifactUnsafe(
        f"the .keras file holds {what}, which could run any code and is never loaded; replace it by a layer of Keras, "
        "by a layer or function registered with keras.saving.register_keras_serializable, or use format='saved_model'"
    )


def _refusal(error: Exception) -> ModelServeError:
    if "`safe_mode=False`" in str(error):
        return ArtifactUnsafe(f"Keras refuses the artifact in safe mode, which is never switched off: {brief(error)}")
    if "Could not locate" in str(error):
        return LoadFailed(
            f"Keras cannot read the artifact: {brief(error)}; what it names is not registered in this process: import "
            "its module where the model is served, or register with format='saved_model', which needs none"
        )
    return LoadFailed(f"Keras cannot read the artifact: {brief(error)}")
