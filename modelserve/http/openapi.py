"""OpenAPI 3.1, from the routes of a mount and the versions that serve now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from modelserve.errors import NotReady
from modelserve.http.routes import Operation, Route
from modelserve.http.schemas import PROBLEM
from modelserve.server import AsyncModelServer
from modelserve.serving.version import LoadedVersion
from modelserve.types import Json

_MODEL: Final = "{model}"


class _Model(NamedTuple):
    """A model and the version of it that serves."""

    name: str
    version: LoadedVersion


def openapi_document(server: AsyncModelServer, root: str, routes: Sequence[Route]) -> dict[str, Any]:
    """Describe routes below ``root``: those of a ``{model}`` once for each model that serves now."""
    paths: dict[str, dict[str, Json]] = {}
    schemas: dict[str, Json] = {"Problem": PROBLEM}
    for route, operation, model in _described(server, routes):
        path = route.pattern if model is None else route.pattern.replace(_MODEL, model.name)
        paths.setdefault(path, {})[route.method.lower()] = _document_of(operation, model, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "modelserve", "version": "1", "description": "Models served by this application."},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _described(server: AsyncModelServer, routes: Sequence[Route]) -> Iterator[tuple[Route, Operation, _Model | None]]:
    described = [(route, route.operation) for route in routes if route.operation is not None]
    yield from ((route, operation, None) for route, operation in described if _MODEL not in route.pattern)
    for model in _serving(server):
        yield from ((route, operation, model) for route, operation in described if _MODEL in route.pattern)


def _serving(server: AsyncModelServer) -> Iterator[_Model]:
    for status in server.status():
        try:
            yield _Model(status.model_name, server.serving_version(status.model_name))
        except NotReady:
            continue


def _document_of(operation: Operation, model: _Model | None, schemas: dict[str, Json]) -> dict[str, Json]:
    """Return what the document says of an operation; add the schemas that it refers to."""
    name = "" if model is None else model.name
    document: dict[str, Json] = {
        "summary": operation.summary.replace(_MODEL, name),
        "operationId": operation.id.replace(_MODEL, name),
        "responses": operation.responses,
    }
    if operation.parameters:
        document["parameters"] = operation.parameters
    if operation.body is not None and model is not None:
        schema, components = operation.body(*model)
        document["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        schemas |= components
    return document
