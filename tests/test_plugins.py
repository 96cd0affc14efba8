"""Names to adapters."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path, PurePath

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline

from modelserve import plugins
from modelserve.errors import ConfigError, InvalidInput, MissingDependency
from modelserve.ports import Framework


class HouseModel(BaseEstimator):  # type: ignore[misc]
    """An estimator of the host's own."""


@pytest.mark.parametrize("name", sorted(plugins.FRAMEWORKS))
def test_every_built_in_framework_resolves(name: str) -> None:
    """Each name of the table leads to an adapter of that name."""
    adapter = plugins.framework(name)
    assert isinstance(adapter, Framework)
    assert adapter.name == name


def test_the_framework_of_an_object_is_told_by_its_classes() -> None:
    """Estimators, pipelines and a host's own subclasses are recognised; other objects are not guessed at."""
    for model in (LinearRegression(), make_pipeline(LinearRegression()), HouseModel()):
        assert plugins.framework_of(model) == "sklearn"
    with pytest.raises(InvalidInput, match="pass framework="):
        plugins.framework_of(np.zeros(3))


def test_the_framework_of_a_file_is_told_by_its_suffix() -> None:
    """Known suffixes name their framework."""
    assert plugins.framework_of_file(Path("model.skops")) == "sklearn"
    with pytest.raises(InvalidInput, match="pass framework="):
        plugins.framework_of_file(Path("model.bin"))


def test_an_unknown_framework_lists_the_known_ones() -> None:
    """The error names what there is."""
    with pytest.raises(ConfigError, match=r"known: .*sklearn"):
        plugins.framework("nonesuch")


def test_a_third_party_adds_a_framework_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's entry point is found under its name."""
    target = plugins.FRAMEWORKS["sklearn"]
    point = importlib.metadata.EntryPoint("theirs", target, "modelserve.frameworks")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    assert plugins.framework("theirs").name == "sklearn"


def test_a_third_party_adds_a_source_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry to import from is found in the same way; what it is made with is its place."""
    point = importlib.metadata.EntryPoint("theirs", "pathlib:PurePath", "modelserve.sources")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **asked: [point] if asked["name"] == "theirs" else []
    )
    assert plugins.source("theirs", "place") == PurePath("place")  # type: ignore[comparison-overlap]
    with pytest.raises(InvalidInput, match="known: mlflow"):
        plugins.source("ours")


def test_a_third_party_adds_a_carrier_of_hints_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's entry point is found under the scheme of its URL, and gets that URL."""
    point = importlib.metadata.EntryPoint("kafka", "builtins:str", "modelserve.changes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    assert str(plugins.changes("kafka://host/topic")) == "kafka://host/topic"


def test_a_third_party_adds_a_cache_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps predictions is found under the scheme of its URL, and gets that URL."""
    point = importlib.metadata.EntryPoint("memcached", "builtins:str", "modelserve.caches")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    assert str(plugins.cache("memcached://host")) == "memcached://host"


def test_a_third_party_adds_a_feature_store_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's entry point is found under the scheme of its URL, and gets that URL."""
    point = importlib.metadata.EntryPoint("cassandra", "builtins:str", "modelserve.features")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    assert str(plugins.features("cassandra://host/table")) == "cassandra://host/table"


def test_a_missing_driver_answers_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An absent optional package names the extra that brings it; other import errors are left as they are."""
    monkeypatch.setitem(__import__("sys").modules, "skops", None)
    with pytest.raises(MissingDependency, match=r"pip install 'modelserve\[sklearn\]'"):
        plugins.require("skops")
    with pytest.raises(ModuleNotFoundError):
        plugins.require("no_such_package_anywhere")


def test_an_adapter_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of a package that is broken names itself, instead of ending in Python's own words."""
    for target in ("nowhere_at_all:Framework", "json:Framework"):
        monkeypatch.setitem(plugins.FRAMEWORKS, "broken", target)
        with pytest.raises(ConfigError, match=rf"{target} is installed as an adapter, and cannot be imported"):
            plugins.framework("broken")
