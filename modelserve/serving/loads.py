"""The versions of one model that are loaded, or on their way: each by itself, memory in the order of importance."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from modelserve.config import ModelOptions
from modelserve.errors import LoadFailed, TooLittleMemory
from modelserve.events import LoadRejected, Observers, VersionUnloaded
from modelserve.serving.deployment import Deployment
from modelserve.serving.load import Attempt, Load
from modelserve.serving.loader import Loader
from modelserve.serving.version import LoadedVersion
from modelserve.serving.wanted import Identity, Plan, Wanted, identity, least_important, rivals
from modelserve.types import ModelVersion, Role

_log = logging.getLogger("modelserve")


@dataclasses.dataclass(frozen=True, slots=True)
class RoleStatus:
    """Where one wanted version stands. ``problem`` says why its last load was refused, until it is loaded."""

    role: Role
    version: str
    loaded: bool
    loading: bool
    problem: str | None


class Loads:
    """Loads what a plan wants of one model, and frees what it no longer wants.

    Each version has attempts and pauses of its own. Where memory has no room for one, the least important of those that
    matter less is freed for it. ``notify`` is called when there is something to :meth:`receive`, or to try again.
    """

    def __init__(
        self,
        model_name: str,
        options: ModelOptions,
        *,
        loader: Loader,
        observers: Observers,
        notify: Callable[[], None],
    ) -> None:
        self._model_name = model_name
        self._options = options
        self._loader = loader
        self._observers = observers
        self._notify = notify
        self._plan: Plan = {}
        self._generation = 0
        self._deployment: Deployment | None = None
        self._loads: dict[Identity, Load] = {}
        self._evicting = False
        self._freeing: set[asyncio.Task[Any]] = set()
        self.loaded: dict[Identity, LoadedVersion] = {}

    # -- where they stand ----------------------------------------------------------------------------------

    def status(self) -> tuple[RoleStatus, ...]:
        """Return where each wanted version stands, the most important first."""
        return tuple(self._status_of(which, wanted) for which, wanted in self._plan.items())

    def _status_of(self, which: Identity, wanted: Wanted) -> RoleStatus:
        load = self._loads.get(which)
        return RoleStatus(
            role=wanted.role,
            version=wanted.version.version,
            loaded=which in self.loaded,
            loading=load is not None and load.running,
            problem=None if load is None else load.problem,
        )

    def with_role(self, role: Role) -> list[LoadedVersion]:
        """Return the versions that are loaded for a role."""
        return [self.loaded[each] for each, wanted in self._plan.items() if wanted.role == role and each in self.loaded]

    # -- a step --------------------------------------------------------------------------------------------

    def receive(self, plan: Plan, generation: int) -> None:
        """Take in what loads have ended with, and have ``plan`` from now on; :meth:`follow` begins what is missing."""
        self._plan, self._generation = plan, generation
        ended = [(which, load, load.receive()) for which, load in self._loads.items()]
        for which, load, outcome in ended:
            if isinstance(outcome, BaseException):
                self._refuse(which, load, outcome)
            elif outcome is not None:
                del self._loads[which]
                self.loaded[which] = outcome
                if not self._is_for_its_role(load):
                    self.free(outcome)

    def follow(self, deployment: Deployment | None) -> None:
        """Load what is missing beside what serves, the most important first; free what is not wanted any more."""
        self._deployment = deployment
        for which, load in list(self._loads.items()):
            if not self._is_for_its_role(load):
                self._abandon(which)
        for which, wanted in self._plan.items():
            if which not in self.loaded:
                self._loads.setdefault(which, Load(wanted, self._begin, self._notify)).proceed(wanted)
        kept = () if deployment is None else deployment.versions
        for which, version in list(self.loaded.items()):
            if which not in self._plan and version not in kept:
                self.free(version)

    async def stop(self) -> None:
        """Give up every load, then drain and free every version."""
        self.receive(self._plan, self._generation)
        for which in list(self._loads):
            self._abandon(which)
        for version in list(self.loaded.values()):
            self.free(version)
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing is being freed."""
        if self._freeing:
            await asyncio.wait(self._freeing)

    def abandon(self) -> None:
        """Free the versions without the loop, which has ended."""
        for version in self.loaded.values():
            version.abandon()

    def free(self, version: LoadedVersion) -> asyncio.Task[Any]:
        """Drain and free a version in the background."""
        del self.loaded[identity(version.meta)]
        unload = self._unload(version)
        return self._in_background(asyncio.create_task(unload, name=f"modelserve-unload-{self._model_name}"))

    async def _unload(self, version: LoadedVersion) -> None:
        try:
            await version.unload()
        except Exception:  # noqa: BLE001  # no caller waits for an unload: what went wrong goes to the log
            _log.exception("failed to free %s %s", self._model_name, version.meta.version)
            return
        self._observers.emit(VersionUnloaded(self._model_name, version.meta.version))

    def _in_background(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Keep a task from being forgotten until it is done."""
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)
        return task

    # -- one load ------------------------------------------------------------------------------------------

    def _is_for_its_role(self, load: Load) -> bool:
        """Whether a load is for the role that its version has now.

        For another it would use the threads, or be lent the replica, of the role that it had.
        """
        wanted = self._plan.get(identity(load.wanted.version))
        return wanted is not None and wanted.role == load.wanted.role

    def _begin(self, wanted: Wanted) -> Attempt:
        return self._load(wanted, self._beside(), self._rivals_of(identity(wanted.version)))

    async def _load(
        self, wanted: Wanted, beside: LoadedVersion | None, rivals: Sequence[ModelVersion]
    ) -> LoadedVersion:
        role, version = wanted
        if version.model_name != self._model_name:
            raise LoadFailed(f"the registry points at version {version.version} of {version.model_name!r} for it")
        return await self._loader.load(version, self._options, role=role, beside=beside, rivals=rivals)

    def _beside(self) -> LoadedVersion | None:
        """Return what serves, or what else is loaded; what is loaded alone needs no memory beside another."""
        if self._deployment is not None:
            return self._deployment.production
        if self._options.reload == "replace":  # nothing but production lends a replica
            return None
        return next(iter(self.loaded.values()), None)

    def _rivals_of(self, which: Identity) -> list[ModelVersion]:
        found = rivals(self._plan, which, loaded=self.loaded.keys(), loading=self._running())
        return [each.version for each in found]

    def _running(self) -> set[Identity]:
        return {which for which, load in self._loads.items() if load.running}

    def _abandon(self, which: Identity) -> asyncio.Task[Any] | None:
        """Give up a load; what it had is freed in the background."""
        attempt = self._loads.pop(which).abandon()
        return None if attempt is None else self._in_background(attempt)

    def _refuse(self, which: Identity, load: Load, error: BaseException) -> None:
        role, version = load.wanted
        retry_s = load.refuse(error)
        refused = "refused %s %s (%s), retrying in %.0f s; what served before still does: %s"
        _log.error(refused, self._model_name, version.version, role, retry_s, error)
        if isinstance(error, Exception):
            name, generation = self._model_name, self._generation
            self._observers.emit(LoadRejected(name, version.version, generation, error, retry_s, role))
        if isinstance(error, TooLittleMemory) and which in self._plan:
            self._make_room(which)

    # -- memory --------------------------------------------------------------------------------------------

    def _make_room(self, which: Identity) -> None:
        """Free the least important version, if it matters less than one that memory has no room for; retry that then.

        One at a time: how much memory that gave is measured by the next attempt.
        """
        if self._evicting:
            return
        may_go = self._running() | (self.loaded.keys() - self._kept_for_production())
        victim = least_important(self._plan, which, may_go)
        if victim is not None:
            self._evicting = True
            self._evict(victim, self._plan[which]).add_done_callback(lambda _: self._evicted(which))

    def _kept_for_production(self) -> Collection[Identity]:
        """Return what serves production, or would after a rollback."""
        now = self._deployment
        return () if now is None else {identity(each.meta) for each in (now.production, now.previous) if each}

    def _evict(self, victim: Identity, heir: Wanted) -> asyncio.Task[Any]:
        freeing = self._abandon(victim) if victim in self._loads else self.free(self.loaded[victim])
        assert freeing is not None  # it is loaded, or is being loaded
        self._loads[victim] = Load(self._plan[victim], self._begin, self._notify)
        error = LoadFailed(f"version {heir.version.version} ({heir.role}) needs its memory")
        self._refuse(victim, self._loads[victim], error)
        return freeing

    def _evicted(self, heir: Identity) -> None:
        self._evicting = False
        if heir in self._loads:
            self._loads[heir].retry()
