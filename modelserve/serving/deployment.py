"""What serves one model now, and which of its versions answers a request."""

from __future__ import annotations

import dataclasses

from modelserve.errors import VersionNotFound
from modelserve.serving.inference import PredictRequest
from modelserve.serving.version import LoadedVersion
from modelserve.types import Arm, Role


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """An immutable snapshot of what serves one model. A request keeps the snapshot that it took.

    ``generation`` is that of the version in production. A version can have several roles.
    """

    model_name: str
    generation: int
    production: LoadedVersion
    previous: LoadedVersion | None = None
    canary: LoadedVersion | None = None
    shadows: tuple[LoadedVersion, ...] = ()

    def choose(self, request: PredictRequest) -> tuple[LoadedVersion, Arm]:
        """Return the version that answers, and why it does. Raises ``VersionNotFound`` for one that is not loaded."""
        if request.version is None:
            return self.production, "production"
        return self._pinned(request.version), "pinned"

    @property
    def roles(self) -> tuple[tuple[Role, LoadedVersion], ...]:
        """The versions that have a role, in the order of their importance."""
        canary: tuple[tuple[Role, LoadedVersion], ...] = () if self.canary is None else (("canary", self.canary),)
        return ("production", self.production), *canary, *(("shadow", shadow) for shadow in self.shadows)

    @property
    def versions(self) -> tuple[LoadedVersion, ...]:
        """Every version that a request can reach; one that has several roles comes several times."""
        previous = () if self.previous is None else (self.previous,)
        return *(version for _, version in self.roles), *previous

    def _pinned(self, name: str) -> LoadedVersion:
        for version in self.versions:
            if version.meta.version == name:
                return version
        raise VersionNotFound(self.model_name, name)
