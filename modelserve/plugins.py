"""Names and URL schemes to adapters, imported only when asked for.

A name is looked up in the built-in table first, then among the entry points of installed packages
(groups ``modelserve.frameworks``, ``modelserve.sources``, ``modelserve.changes``, ``modelserve.caches`` and
``modelserve.features``), so a third party adds an adapter without a change here.
A driver that is missing answers with the line that installs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from modelserve.errors import ConfigError, InvalidInput, MissingDependency
from modelserve.ports import Cache, ChangeHints, Converter, FeatureStore, Framework, Keys, ModelSource, ObjectReader

DOTTED_PATH: Final = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
"""What :func:`resolve` takes, as a regular expression: ``package.module:name``."""
FRAMEWORKS: Final = {
    "onnx": "modelserve.adapters.frameworks.onnx:OnnxFramework",
    "pytorch": "modelserve.adapters.frameworks.pytorch:PyTorchFramework",
    "sklearn": "modelserve.adapters.frameworks.sklearn:SklearnFramework",
    "tensorflow": "modelserve.adapters.frameworks.tensorflow:TensorFlowFramework",
}
_CONVERTERS: Final = {
    ("sklearn", "onnx"): "modelserve.adapters.converters.sklearn_to_onnx:SklearnToOnnx",
}
CHANGES: Final = {
    "postgres": "modelserve.adapters.changes.postgres:PostgresChanges",
    "postgresql": "modelserve.adapters.changes.postgres:PostgresChanges",
    "postgresql+psycopg": "modelserve.adapters.changes.postgres:PostgresChanges",
    "redis": "modelserve.adapters.changes.redis:RedisChanges",
    "rediss": "modelserve.adapters.changes.redis:RedisChanges",
    "unix": "modelserve.adapters.changes.redis:RedisChanges",
}
CACHES: Final = {
    "memory": "modelserve.caching.memory:from_url",
    "redis": "modelserve.adapters.cache.redis:RedisCache",
    "rediss": "modelserve.adapters.cache.redis:RedisCache",
    "unix": "modelserve.adapters.cache.redis:RedisCache",
}
FEATURES: Final = {
    "dynamodb": "modelserve.adapters.features.dynamodb:DynamoDbFeatures",
    "feast": "modelserve.adapters.features.feast:FeastFeatures",
    "memory": "modelserve.adapters.features.memory:MemoryFeatures",
    "redis": "modelserve.adapters.features.redis:RedisFeatures",
    "rediss": "modelserve.adapters.features.redis:RedisFeatures",
    "unix": "modelserve.adapters.features.redis:RedisFeatures",
}
_OBJECT_READERS: Final = {
    "s3": "modelserve.adapters.stores.s3:S3Reader",
    "s3a": "modelserve.adapters.stores.s3:S3Reader",
}
_SOURCES: Final = {
    "mlflow": "modelserve.adapters.registries.mlflow:MlflowSource",
}
_KEYS: Final = "modelserve.adapters.signing.ed25519:Ed25519Keys"
_FRAMEWORK_OF_PACKAGE: Final = {
    "keras": "tensorflow",
    "lightgbm": "sklearn",
    "onnx": "onnx",
    "sklearn": "sklearn",
    "tensorflow": "tensorflow",
    "torch": "pytorch",
    "xgboost": "sklearn",
}
_FRAMEWORK_OF_SUFFIX: Final = {
    ".joblib": "sklearn",
    ".keras": "tensorflow",
    ".onnx": "onnx",
    ".pickle": "sklearn",
    ".pkl": "sklearn",
    ".pt": "pytorch",
    ".pt2": "pytorch",
    ".pth": "pytorch",
    ".safetensors": "pytorch",
    ".skops": "sklearn",
}
_SAVED_MODEL: Final = "saved_model.pb"  # what makes a folder a SavedModel
_EXTRAS: Final = {
    "boto3": "aws",
    "botocore": "aws",
    "cloudpickle": "mlflow",
    "cryptography": "signing",
    "feast": "feast",
    "google": "onnx",
    "joblib": "sklearn",
    "keras": "tensorflow",
    "lightgbm": "lightgbm",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxmltools": "onnx",
    "onnxruntime": "onnx",
    "pandas": "sklearn",
    "psycopg": "postgres",
    "redis": "redis",
    "rich": "cli",
    "s3fs": "aws",
    "safetensors": "torch",
    "skl2onnx": "onnx",
    "sklearn": "sklearn",
    "skops": "sklearn",
    "tensorflow": "tensorflow",
    "torch": "torch",
    "typer": "cli",
    "xgboost": "xgboost",
    "yaml": "mlflow",
}


def framework(name: str) -> Framework:
    """Return the adapter of a framework by name.

    Raises ``ConfigError`` for an unknown name and ``MissingDependency`` when its package is not installed.
    """
    return cast("Framework", _adapter(framework_path(name))())


def framework_path(name: str) -> str:
    """Return the dotted path of a framework's adapter, ``"package.module:Class"``, without importing it.

    Raises ``ConfigError`` for an unknown name.
    """
    target = FRAMEWORKS.get(name) or _entry_point("modelserve.frameworks", name)
    if target is None:
        known = ", ".join(sorted(FRAMEWORKS))
        msg = f"unknown framework {name!r}; known: {known}"
        raise ConfigError(msg)
    return target


def converter(optimize: str, framework_name: str) -> Converter:
    """Return what turns models of a framework into another format.

    Raises ``InvalidInput`` when nothing does, and ``MissingDependency`` when its packages are not installed.
    """
    target = _CONVERTERS.get((framework_name, optimize))
    if target is None:
        known = ", ".join(f"{name} models to {other!r}" for name, other in _CONVERTERS)
        raise InvalidInput("optimize", f"cannot turn a {framework_name} model into {optimize!r}; it turns {known}")
    return cast("Converter", resolve(target)())


def object_reader(scheme: str, storage_options: Mapping[str, Any]) -> ObjectReader | None:
    """Return what reads the objects of a store, by the scheme of its URL; None where the fsspec driver does it.

    Raises ``MissingDependency`` when its package is not installed.
    """
    target = _OBJECT_READERS.get(scheme)
    return None if target is None else cast("ObjectReader", resolve(target)(storage_options))


def source(name: str, url: str | None = None) -> ModelSource:
    """Return what reads another registry, of this kind and at this place (None: where its configuration says).

    Raises ``InvalidInput`` for an unknown kind, and ``MissingDependency`` when its package is not installed.
    """
    target = _SOURCES.get(name) or _entry_point("modelserve.sources", name)
    if target is None:
        raise InvalidInput("source", f"{name!r} is no registry to import from; known: {', '.join(_SOURCES)}")
    return cast("ModelSource", _adapter(target)(url))


def keys() -> Keys:
    """Return what makes and reads the keys that versions are signed with. Raises ``MissingDependency``."""
    return cast("Keys", resolve(_KEYS)())


def changes(url: str) -> ChangeHints:
    """Return what tells of changes made by other processes, by the scheme of its URL. It connects to nothing yet.

    Raises ``ConfigError`` for an unknown scheme or a URL that cannot be read, and ``MissingDependency`` when the
    driver is not installed.
    """
    return cast("ChangeHints", _by_scheme(url, "changes", CHANGES, "modelserve.changes"))


def cache(url: str) -> Cache:
    """Return what keeps predictions, by the scheme of its URL, not yet connected. Raises as :func:`changes`."""
    return cast("Cache", _by_scheme(url, "cache", CACHES, "modelserve.caches"))


def features(url: str) -> FeatureStore:
    """Return a feature store, by the scheme of its URL, not yet connected. Raises as :func:`changes`."""
    return cast("FeatureStore", _by_scheme(url, "features", FEATURES, "modelserve.features"))


def _by_scheme(url: str, option: str, table: Mapping[str, str], group: str) -> Any:
    scheme = url.partition("://")[0]
    target = table.get(scheme) or _entry_point(group, scheme)
    if target is None:
        known = ", ".join(f"{name}://" for name in sorted(table))
        named = f"there is nothing under {scheme}://" if "://" in url else "that is no URL"  # it may be a password
        raise ConfigError(f"{option}: {named}; known: {known}")
    return _adapter(target)(url)


def _adapter(target: str) -> Any:
    """Import what a table or an entry point names, which may be of a package that is broken or half removed."""
    try:
        return resolve(target)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"{target} is installed as an adapter, and cannot be imported: {error}") from error


def framework_of(model: object) -> str:
    """Name the framework an object belongs to, by the packages its classes come from. Imports none of them."""
    for cls in type(model).__mro__:
        name = _FRAMEWORK_OF_PACKAGE.get(cls.__module__.partition(".")[0])
        if name is not None:
            return name
    msg = f"cannot tell the framework of a {type(model).__qualname__}; pass framework="
    raise InvalidInput("framework", msg)


def framework_of_file(path: Path) -> str:
    """Name the framework that writes files with this suffix, or folders like this one."""
    name = "tensorflow" if (path / _SAVED_MODEL).is_file() else _FRAMEWORK_OF_SUFFIX.get(path.suffix)
    if name is None:
        raise InvalidInput("framework", f"cannot tell the framework of {path.name}; pass framework=")
    return name


def resolve(target: str) -> Any:
    """Import ``package.module:name``."""
    module_name, _, attribute = target.partition(":")
    return getattr(require(module_name), attribute)


def require(module_name: str, *, hiding: Sequence[str] = ()) -> Any:
    """Import a module; raise ``MissingDependency`` with the install line when an optional driver is absent.

    What is named in ``hiding`` looks absent to it: packages that it would import only in case they are wanted.
    """
    with _hidden(() if module_name in sys.modules else hiding):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = (error.name or module_name).partition(".")[0]
            if missing not in _EXTRAS:
                raise
            raise MissingDependency(missing, _EXTRAS[missing]) from error


@contextlib.contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is how an import is refused
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def _entry_point(group: str, name: str) -> str | None:
    found = importlib.metadata.entry_points(group=group, name=name)
    return next((point.value for point in found), None)
