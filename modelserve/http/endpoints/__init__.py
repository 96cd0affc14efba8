"""The endpoints: a module per family of routes, each with the handlers and what OpenAPI says of them.

A new family is a module here, with a ``routes`` that returns its :class:`modelserve.http.routes.Route` objects, and a
line in ``_FAMILIES``. The name there is what ``ms.asgi(server, routes=…)`` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from modelserve.errors import ConfigError
from modelserve.http.endpoints import description, health, metrics, models, predictions
from modelserve.http.routes import Route
from modelserve.server import AsyncModelServer

Families: TypeAlias = str | Iterable[str] | None
"""The name of a family, or several; None: all."""

_FAMILIES: Final[dict[str, Callable[[AsyncModelServer], Sequence[Route]]]] = {
    "predict": predictions.routes,
    "models": models.routes,
    "health": health.routes,
    "metrics": metrics.routes,
}
_DESCRIPTION: Final = "openapi"  # a family too, made of what the others say
_NAMES: Final = (*_FAMILIES, _DESCRIPTION)


def routes_of(server: AsyncModelServer, families: Families = None) -> list[Route]:
    """Return the routes that a mount answers. Raises ``ConfigError`` for an unknown family, and for none at all."""
    names = _chosen(families)
    routes = [route for name, make in _FAMILIES.items() if name in names for route in make(server)]
    return [*routes, *description.routes(server, routes)] if _DESCRIPTION in names else routes


def _chosen(families: Families) -> Sequence[str]:
    if families is None:
        return _NAMES
    names = [families] if isinstance(families, str) else list(families)
    unknown = [name for name in names if name not in _NAMES]
    if unknown or not names:
        found = f"{unknown[0]!r:.40}" if unknown else "none at all"
        raise ConfigError(f"routes: expected some of {', '.join(_NAMES)}, got {found}")
    return names
