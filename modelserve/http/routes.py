"""The route table: which handler answers a method and a path.

A :class:`Route` holds everything about one route. Dispatch, the 405 with its ``Allow``, and the OpenAPI document are
read from it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from modelserve.http.messages import Response
from modelserve.http.problems import HttpProblem
from modelserve.serving.version import LoadedVersion
from modelserve.types import Json

_REMEMBERED: Final = 1024  # paths: walking the tree for every request would cost more than the rest of its dispatch
_LONGEST: Final = 1024  # characters; names of models and versions have 128
Handler: TypeAlias = Callable[..., Awaitable[Response]]
"""Called with the :class:`Request` and the text of each of the pattern's parameters, in their order."""


class Body(NamedTuple):
    """The JSON Schema of a body, and the components that it refers to."""

    schema: Json
    components: Mapping[str, Json]


class Operation(NamedTuple):
    """What OpenAPI says of a route. In ``id`` and ``summary``, ``{model}`` stands for the name of a model."""

    id: str
    summary: str
    responses: Mapping[str, Json]
    parameters: Sequence[Json] = ()
    body: Callable[[str, LoadedVersion], Body] | None = None


class Route(NamedTuple):
    """One method of one path. HEAD comes with GET.

    In ``pattern``, a segment in braces is a parameter: ``/predict/{model}``. A route of a ``{model}`` is described in
    OpenAPI once for each model that serves. A route without an ``operation`` is not described.
    """

    method: str
    pattern: str
    handler: Handler
    operation: Operation | None = None


_NOTHING: Final[tuple[Mapping[str, Handler], tuple[str, ...]]] = ({}, ())


class RouteTable:
    """Finds routes in a tree of the segments of their paths.

    Raises ``ValueError`` for a second route of the same method and path, and for a name beside a parameter, which would
    hide the model of that name.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Node()
        for route in routes:
            self._root.add(route)
        self._known = lru_cache(_REMEMBERED)(self._walk)

    def find(self, method: str, path: str) -> tuple[Handler, tuple[str, ...]]:
        """Return the handler of a path, with or without a slash at its end, and its arguments.

        Raises ``HttpProblem``: 404 for a path, 405 for a method that is not there.
        """
        handlers, arguments = self._known(path) if len(path) <= _LONGEST else _NOTHING
        handler = handlers.get(method)
        if handler is None:
            raise _not_allowed(handlers) if handlers else _nothing_here()
        return handler, arguments

    def _walk(self, path: str) -> tuple[Mapping[str, Handler], tuple[str, ...]]:
        node = self._root
        arguments: list[str] = []
        for segment in path.removesuffix("/").split("/"):
            if segment in node.named:
                node = node.named[segment]
            elif segment and node.parameter is not None:
                node = node.parameter
                arguments.append(segment)
            else:
                return _NOTHING
        return node.handlers, tuple(arguments)


class _Node:
    """What can come after the same first segments."""

    __slots__ = ("handlers", "named", "parameter")

    def __init__(self) -> None:
        self.named: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.handlers: dict[str, Handler] = {}

    def add(self, route: Route) -> None:
        node = self
        for segment in route.pattern.removesuffix("/").split("/"):
            node = node._after(segment)
        if route.method in node.handlers:
            raise ValueError(f"{route.method} {route.pattern}: there is such a route already")
        node.handlers[route.method] = route.handler

    def _after(self, segment: str) -> _Node:
        if segment.startswith("{"):
            child = self.parameter = self.parameter or _Node()
        else:
            child = self.named.setdefault(segment, _Node())
        if self.named and self.parameter is not None:
            raise ValueError(f"{segment}: a name beside a parameter would hide the model of that name")
        return child


def _nothing_here() -> HttpProblem:
    return HttpProblem(404, "not-found", "there is nothing here")


def _not_allowed(methods: Iterable[str]) -> HttpProblem:
    return HttpProblem(405, "method-not-allowed", f"use {' or '.join(methods)}", allow=", ".join(methods))
