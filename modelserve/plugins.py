"""Names and URL schemes to adapters, imported only when asked for.

A name is looked up in the built-in table first, then among the entry points of installed packages
(group ``modelserve.frameworks``), so a third party adds an adapter without a change here. A driver that is
missing answers with the line that installs it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any, cast

from modelserve.errors import ConfigError, InvalidInput, MissingDependency
from modelserve.ports import Framework

FRAMEWORKS = {
    "sklearn": "modelserve.adapters.frameworks.sklearn:SklearnFramework",
}
_FRAMEWORK_OF_PACKAGE = {"sklearn": "sklearn"}
_FRAMEWORK_OF_SUFFIX = {".skops": "sklearn", ".joblib": "sklearn", ".pkl": "sklearn", ".pickle": "sklearn"}
_EXTRAS = {
    "sklearn": "sklearn",
    "skops": "sklearn",
    "joblib": "sklearn",
    "pandas": "sklearn",
    "s3fs": "aws",
    "psycopg": "postgres",
    "typer": "cli",
    "rich": "cli",
}


def framework(name: str) -> Framework:
    """Return the adapter of a framework by name.

    Raises ``ConfigError`` for an unknown name and ``MissingDependency`` when its package is not installed.
    """
    return cast("Framework", resolve(framework_path(name))())


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


def framework_of(model: object) -> str:
    """Name the framework an object belongs to, by the packages its classes come from. Imports none of them."""
    for cls in type(model).__mro__:
        name = _FRAMEWORK_OF_PACKAGE.get(cls.__module__.partition(".")[0])
        if name is not None:
            return name
    msg = f"cannot tell the framework of a {type(model).__qualname__}; pass framework="
    raise InvalidInput("framework", msg)


def framework_of_file(path: Path) -> str:
    """Name the framework that writes files with this suffix."""
    name = _FRAMEWORK_OF_SUFFIX.get(path.suffix)
    if name is None:
        raise InvalidInput("framework", f"cannot tell the framework of {path.name}; pass framework=")
    return name


def resolve(target: str) -> Any:
    """Import ``package.module:name``."""
    module_name, _, attribute = target.partition(":")
    return getattr(require(module_name), attribute)


def require(module_name: str) -> Any:
    """Import a module; raise ``MissingDependency`` with the install line when an optional driver is absent."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or module_name).partition(".")[0]
        if missing not in _EXTRAS:
            raise
        raise MissingDependency(missing, _EXTRAS[missing]) from error


def _entry_point(group: str, name: str) -> str | None:
    found = importlib.metadata.entry_points(group=group, name=name)
    return next((point.value for point in found), None)
