"""Which version answers a request, by its role or by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from modelserve.errors import VersionNotFound
from modelserve.serving.deployment import Deployment
from modelserve.serving.inference import PredictRequest
from tests.serving.versions import version_of


def loaded(name: str) -> Any:
    """Stand where a loaded version does: choosing asks nothing of it but its name."""
    return SimpleNamespace(meta=version_of("m", name))


VERSIONS = {name: loaded(name) for name in ("1", "2", "3", "4", "5")}
DEPLOYMENT = Deployment(
    model_name="m",
    generation=7,
    production=VERSIONS["2"],
    previous=VERSIONS["1"],
    canary=VERSIONS["3"],
    shadows=(VERSIONS["4"], VERSIONS["5"]),
)


@pytest.mark.parametrize("key", [None, "user-7"])
def test_without_a_version_production_answers(key: str | None) -> None:
    """Neither a canary nor a shadow answers a request that does not name it, whatever its key."""
    assert DEPLOYMENT.choose(PredictRequest("m", (), key=key)) == (VERSIONS["2"], "production")


@pytest.mark.parametrize("name", VERSIONS)
def test_a_request_may_name_any_version_that_is_loaded(name: str) -> None:
    """It is pinned then, whatever role the version has."""
    assert DEPLOYMENT.choose(PredictRequest("m", (), version=name)) == (VERSIONS[name], "pinned")


def test_a_version_that_is_not_loaded_is_not_found() -> None:
    """The error names the model and the version."""
    with pytest.raises(VersionNotFound, match=r"6.*'m'|'m'.*6"):
        DEPLOYMENT.choose(PredictRequest("m", (), version="6"))


def test_roles_are_in_the_order_of_their_importance() -> None:
    """Production comes first, then the canary, then the shadows; the version before has no role."""
    named = [(role, version.meta.version) for role, version in DEPLOYMENT.roles]
    assert named == [("production", "2"), ("canary", "3"), ("shadow", "4"), ("shadow", "5")]
