"""The public names, pinned: a change here is a change for users."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import modelserve as ms
from modelserve.config import ServerOptions, Settings

NAMES = [
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

SIGNATURES = {
    "Registry": "url artifacts changes now",
    "Registry.register": "self model_name version model example signature framework method trusted format "
    "factory optimize baseline max_body_bytes metrics tags signing_key actor reason",
    "Registry.sign": "self model_name version key actor reason",
    "Registry.promote": "self model_name version actor reason",
    "Registry.rollback": "self model_name actor reason",
    "Registry.archive": "self model_name version actor reason",
    "Registry.get": "self model_name version",
    "Registry.versions": "self model_name",
    "Registry.production": "self model_name",
    "Registry.history": "self model_name",
    "Features": "entity names defaults max_age_s budget_ms group overridable",
    "FeatureWriter": "store now",
    "FeatureWriter.put": "self group key values written_at",
    "FeatureWriter.load": "self table group key time",
    "FeatureWriter.get": "self group key names",
    "AsyncModelServer": "registry models options",
    "AsyncModelServer.predict": "self model_name inputs version key timeout_ms request_id",
    "AsyncModelServer.predict_many": "self model_name instances version key timeout_ms request_id",
    "ModelServer": "registry models options",
    "ModelServer.predict": "self model_name inputs version key timeout_ms request_id",
    "import_model": "registry source uri source_url name version example method trusted allow_pickle signing_key "
    "actor reason",
    "asgi": "server prefix otherwise max_body_bytes routes",
    "wsgi": "server max_body_bytes routes",
}

SERVER_OPTIONS = (
    "cache_dir cache_bytes download_limit_s cache changes poll_s trusted_keys features log log_key metrics metrics_dir"
)


def test_the_options_of_a_server_are_these() -> None:
    """Option names are part of the interface, and the same in Python, in a file and in the environment."""
    assert list(ServerOptions.__annotations__) == SERVER_OPTIONS.split()
    assert set(Settings.model_fields) - {"registry", "artifacts", "models"} == set(SERVER_OPTIONS.split())


def test_the_names_are_these() -> None:
    """What ``from modelserve import *`` gives is what is listed here, and all of it can be had."""
    assert sorted(ms.__all__) == sorted(NAMES)
    assert all(getattr(ms, name) is not None for name in NAMES)
    assert set(NAMES) <= set(dir(ms))


@pytest.mark.parametrize("path", SIGNATURES)
def test_the_signatures_are_these(path: str) -> None:
    """Parameter names are part of the interface."""
    target: object = ms
    for part in path.split("."):
        target = getattr(target, part)
    assert " ".join(inspect.signature(target).parameters) == SIGNATURES[path]  # type: ignore[arg-type]


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Lazy names do not hide typing mistakes."""
    with pytest.raises(AttributeError, match="no_such_name"):
        ms.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("__")])
def test_every_public_name_is_documented(name: str) -> None:
    """Each public name has a docstring, and so has each public method of it."""
    target = getattr(ms, name)
    assert inspect.getdoc(target)
    for method, value in vars(target).items() if inspect.isclass(target) else ():
        if not method.startswith("_") and inspect.isfunction(value):
            assert inspect.getdoc(value), method


@pytest.mark.parametrize("server", [ms.AsyncModelServer, ms.ModelServer])
def test_a_misspelt_option_is_refused_with_the_one_that_is_near(server: Any, tmp_path: Path) -> None:
    """An option that is taken and ignored would leave a server as it was not meant to be."""
    with pytest.raises(TypeError, match="'cach_dir' is not an option of a server; did you mean cache_dir"):
        server(ms.Registry(f"sqlite:///{tmp_path / 'models.db'}"), cach_dir="x")
