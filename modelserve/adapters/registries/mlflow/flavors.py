"""From a flavour of MLflow to what one of our frameworks takes: a file, or a live object.

What is data is opened or handed on as a file. A pickle is opened only where that was allowed; what comes out of it is
registered as a live object, in the framework's safe format.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from modelserve import plugins
from modelserve.errors import ArtifactUnsafe, InvalidInput, MissingDependency, describe

Flavor: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model as our registry takes it: an object or a path, and whose it is."""

    model: Any
    framework: str
    method: str = "predict"
    format: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """The downloaded files of a version, and whether pickles among them may be opened."""

    root: Path
    allow_pickle: bool

    def path(self, *names: object) -> Path:
        """Return a file or folder that the description names. Raises ``InvalidInput`` unless it lies inside."""
        path = self.root.joinpath(*map(str, names)).resolve()
        if not path.is_relative_to(self.root) or not path.exists():
            raise InvalidInput("model", f"its file MLmodel names {'/'.join(map(str, names))!r}, which it does not hold")
        return path

    def unpickle(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """Open a pickle. Raises ``ArtifactUnsafe`` where that is not allowed."""
        if not self.allow_pickle:
            raise ArtifactUnsafe(
                f"{path.name} is a pickle, which runs code when it is opened; if you trust whoever logged the model, "
                "import it with allow_pickle=True (--allow-pickle): it is then registered in a safe format"
            )
        plugins.require("cloudpickle")  # what such pickles are made with has to be there to open them
        try:
            return read(path)
        except Exception as error:
            raise InvalidInput("model", f"{path.name} cannot be opened here: {describe(error)}") from error


def open_model(root: Path, description: Mapping[str, Any], *, allow_pickle: bool) -> Opened:
    """Return the model in the first flavour that we know. Raises ``InvalidInput`` that lists those that work."""
    flavors = description["flavors"]
    for name, open_flavor in _FLAVORS.items():
        if isinstance(flavors.get(name), dict):
            opened = open_flavor(Folder(root, allow_pickle), flavors[name])
            method = (flavors.get("python_function") or {}).get("predict_fn") if name == "sklearn" else None
            return dataclasses.replace(opened, method=str(method)) if method else opened
    known = ", ".join(_FLAVORS)
    raise InvalidInput("model", f"no flavor of it can be served ({', '.join(map(str, flavors))}); these can: {known}")


# -- one flavour each --------------------------------------------------------------------------------------


def _sklearn(folder: Folder, flavor: Flavor) -> Opened:
    return _estimator(folder, folder.path(flavor.get("pickled_model", "model.pkl")), flavor)


def _estimator(folder: Folder, path: Path, flavor: Flavor) -> Opened:
    if flavor.get("serialization_format") == "skops":
        return Opened(model=path, framework="sklearn", format="skops")
    return Opened(model=folder.unpickle(path, _unpickled), framework="sklearn")


def _onnx(folder: Folder, flavor: Flavor) -> Opened:
    """Read the graph with the weights that MLflow puts into files beside it: our artifact is one file."""
    path = folder.path(flavor.get("data", "model.onnx"))
    try:
        return Opened(model=plugins.require("onnx").load(str(path)), framework="onnx")
    except MissingDependency:
        raise
    except Exception as error:
        raise InvalidInput("model", f"{path.name} is no ONNX model that can be read: {type(error).__name__}") from error


def _xgboost(folder: Folder, flavor: Flavor) -> Opened:
    path = folder.path(flavor.get("data", "model.xgb"))
    package, _, name = str(flavor.get("model_class", "xgboost.core.Booster")).rpartition(".")
    if package != "xgboost.sklearn":
        raise InvalidInput("model", "a bare Booster does not say how to answer; log the estimator (XGBClassifier, …)")
    estimator = getattr(plugins.require("xgboost"), name, None)
    if estimator is None or not name.startswith("XGB"):
        raise InvalidInput("model", f"XGBoost has no estimator {name[:100]!r}")
    loaded = estimator()
    try:
        loaded.load_model(path)
    except Exception as error:
        raise InvalidInput("model", f"XGBoost cannot read {path.name}: {type(error).__name__}") from error
    return Opened(model=loaded, framework="sklearn")


def _lightgbm(folder: Folder, flavor: Flavor) -> Opened:
    if str(flavor.get("model_class", "lightgbm.basic.Booster")).endswith(".Booster"):
        raise InvalidInput("model", "a bare Booster does not say how to answer; log the estimator (LGBMClassifier, …)")
    return _estimator(folder, folder.path(flavor.get("data", "model.pkl")), flavor)


def _keras(folder: Folder, flavor: Flavor) -> Opened:
    data = folder.path(flavor.get("data", "data"))
    if (data / "model").is_dir():
        return Opened(model=data / "model", framework="tensorflow", format="saved_model")
    return Opened(model=folder.path(flavor.get("data", "data"), "model.keras"), framework="tensorflow", format="keras")


def _tensorflow(folder: Folder, flavor: Flavor) -> Opened:
    saved = flavor.get("saved_model_dir")
    if saved is None:
        return _keras(folder, flavor)
    return Opened(model=folder.path(saved), framework="tensorflow", format="saved_model")


def _pytorch(folder: Folder, flavor: Flavor) -> Opened:
    data = folder.path(flavor.get("model_data", "data"))
    if (data / "model.pt2").is_file():
        return Opened(model=folder.path(data, "model.pt2"), framework="pytorch", format="pt2")
    return Opened(model=folder.unpickle(folder.path(data, "model.pth"), _torch_unpickled), framework="pytorch")


_FLAVORS: Final[dict[str, Callable[[Folder, Flavor], Opened]]] = {
    "sklearn": _sklearn,
    "onnx": _onnx,
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
    "keras": _keras,
    "tensorflow": _tensorflow,
    "pytorch": _pytorch,
}


def _unpickled(path: Path) -> Any:
    with path.open("rb") as stream:
        return pickle.load(stream)  # noqa: S301  # reached only where the caller allowed pickles


def _torch_unpickled(path: Path) -> Any:
    return plugins.require("torch").load(path, weights_only=False, map_location="cpu")
