"""The route table: what is found, what is refused, and what cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.http.messages import Request, Response
from modelserve.http.problems import HttpProblem
from modelserve.http.routes import Route, RouteTable


async def first(_: Request, *arguments: str) -> Response:
    return Response(200, " ".join(arguments).encode())


async def second(_: Request, *arguments: str) -> Response:
    return Response(201, " ".join(arguments).encode())


TABLE = RouteTable(
    [
        Route("GET", "/", first),
        Route("GET", "/models", first),
        Route("GET", "/models/{model}", first),
        Route("POST", "/models/{model}", second),
        Route("POST", "/models/{model}/versions/{version}/infer", first),
        Route("GET", "/health/live", second),
    ]
)


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "", (first, ())),
        ("GET", "/models", (first, ())),
        ("GET", "/models/a b", (first, ("a b",))),
        ("POST", "/models/models", (second, ("models",))),
        ("POST", "/models/{model}", (second, ("{model}",))),
        ("POST", "/models/m/versions/1.0/infer", (first, ("m", "1.0"))),
        ("GET", "/health/live", (second, ())),
    ],
)
def test_a_path_finds_its_handler_and_arguments(method: str, path: str, found: Any, slash: str) -> None:
    """Each parameter is one segment; a slash at the end changes nothing."""
    assert TABLE.find(method, path + slash) == found


@pytest.mark.parametrize(
    "path",
    [
        *("models", "//", "//models", "/models//", "/models//versions/1/infer", "/models/m/versions"),
        *("/models/m/n", "/models/m/versions/1/infer/2", "/Models", "/health", "/health/live/now", "/.", "/models\0"),
    ],
)
def test_other_paths_are_not_found(path: str) -> None:
    """A segment too many, too few, empty, or written differently is a 404, whatever the method."""
    for method in ("GET", "POST", "X"):
        with pytest.raises(HttpProblem) as refused:
            TABLE.find(method, path)
        assert (refused.value.status, refused.value.headers) == (404, {})


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/models", "GET"), ("/models/m", "GET, POST"), ("/models/m/versions/1/infer/", "POST")],
)
def test_other_methods_are_not_allowed(path: str, allowed: str) -> None:
    """The 405 names every method of the path."""
    with pytest.raises(HttpProblem) as refused:
        TABLE.find("PUT", path)
    assert (refused.value.status, refused.value.headers) == (405, {"allow": allowed})
    assert str(refused.value) == f"use {allowed.replace(', ', ' or ')}"


@given(model=st.text(min_size=1), version=st.text(min_size=1))
def test_a_parameter_takes_any_segment(model: str, version: str) -> None:
    """What has no slash in it is passed on as it is; whether it exists is the handler's to say."""
    path = f"/models/{model}/versions/{version}/infer"
    if "/" in model + version:
        with pytest.raises(HttpProblem):
            TABLE.find("POST", path)
    else:
        assert TABLE.find("POST", path) == (first, (model, version))


def test_a_second_route_of_a_path_is_refused() -> None:
    """One of the two would never be reached."""
    with pytest.raises(ValueError, match=r"GET /m/\{name\}: there is such a route already"):
        RouteTable([Route("GET", "/m/{model}", first), Route("GET", "/m/{name}", second)])


@pytest.mark.parametrize("patterns", [("/m/{model}", "/m/all"), ("/m/all/now", "/m/{model}")])
def test_a_name_beside_a_parameter_is_refused(patterns: tuple[str, str]) -> None:
    """A model that has that name could not be reached."""
    with pytest.raises(ValueError, match="would hide the model of that name"):
        RouteTable(Route("GET", pattern, first) for pattern in patterns)
