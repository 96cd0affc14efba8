"""The families of routes: which of them a mount answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from modelserve.errors import ConfigError

Routes: TypeAlias = str | Iterable[str] | None
"""The name of a family, or several; None: all."""
FAMILIES: Final = ("predict", "models", "health", "openapi", "metrics")


def chosen(routes: Routes) -> frozenset[str]:
    """Return the families that a mount answers. Raises ``ConfigError`` for an unknown one, and for none at all."""
    if routes is None:
        return frozenset(FAMILIES)
    names = [routes] if isinstance(routes, str) else list(routes)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names:
        found = f"{unknown[0]!r:.40}" if unknown else "none at all"
        raise ConfigError(f"routes: expected some of {', '.join(FAMILIES)}, got {found}")
    return frozenset(names)
