"""Serve machine-learning models from inside a web application.

The names below are the public face. Each is imported when it is first used, so that a worker process, or a training
job that only registers, loads no more than it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelserve.config import ModelOptions, Settings
    from modelserve.errors import (
        ArtifactCorrupt,
        ArtifactUnsafe,
        BackendUnavailable,
        ConfigError,
        DeadlineExceeded,
        InferenceFailed,
        InvalidInput,
        InvalidTransition,
        LoadError,
        MissingDependency,
        ModelNotFound,
        ModelServeError,
        NotReady,
        Overloaded,
        VersionExists,
        VersionNotFound,
    )
    from modelserve.features import Features, FeatureWriter
    from modelserve.http.asgi import asgi
    from modelserve.http.wsgi import wsgi
    from modelserve.registry import Registry
    from modelserve.registry.importing import import_model
    from modelserve.server import AsyncModelServer
    from modelserve.signature import Field, Signature
    from modelserve.sync_server import ModelServer
    from modelserve.types import ModelVersion, Prediction, Scaling

_HOMES = {
    "config": ("ModelOptions", "Settings"),
    "errors": (
        "ArtifactCorrupt",
        "ArtifactUnsafe",
        "BackendUnavailable",
        "ConfigError",
        "DeadlineExceeded",
        "InferenceFailed",
        "InvalidInput",
        "InvalidTransition",
        "LoadError",
        "MissingDependency",
        "ModelNotFound",
        "ModelServeError",
        "NotReady",
        "Overloaded",
        "VersionExists",
        "VersionNotFound",
    ),
    "features": ("FeatureWriter", "Features"),
    "http.asgi": ("asgi",),
    "http.wsgi": ("wsgi",),
    "registry.importing": ("import_model",),
    "registry": ("Registry",),
    "server": ("AsyncModelServer",),
    "signature": ("Field", "Signature"),
    "sync_server": ("ModelServer",),
    "types": ("ModelVersion", "Prediction", "Scaling"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "ArtifactCorrupt",
    "ArtifactUnsafe",
    "AsyncModelServer",
    "BackendUnavailable",
    "ConfigError",
    "DeadlineExceeded",
    "FeatureWriter",
    "Features",
    "Field",
    "InferenceFailed",
    "InvalidInput",
    "InvalidTransition",
    "LoadError",
    "MissingDependency",
    "ModelNotFound",
    "ModelOptions",
    "ModelServeError",
    "ModelServer",
    "ModelVersion",
    "NotReady",
    "Overloaded",
    "Prediction",
    "Registry",
    "Scaling",
    "Settings",
    "Signature",
    "VersionExists",
    "VersionNotFound",
    "__version__",
    "asgi",
    "import_model",
    "wsgi",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelserve' has no attribute {name!r}")
    value = getattr(import_module(f"modelserve.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
