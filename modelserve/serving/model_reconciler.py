"""One model kept as it is wanted: every step works towards the state that was last read of the registry.

A model reconciler waits for nothing, neither for a read nor for a load: it takes a step when a state is read, when a
load ends and when a pause is over. So a load that ended is taken in although something else fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final, Protocol

from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable
from modelserve.events import Observers, VersionLoaded
from modelserve.ports import ChangeListener
from modelserve.resilience.executor import DaemonExecutor, call_with_timeout
from modelserve.serving.deployment import Deployment
from modelserve.serving.loader import Loader
from modelserve.serving.loads import Loads, RoleStatus
from modelserve.serving.snapshots import Snapshot, Snapshots
from modelserve.serving.version import LoadedVersion
from modelserve.serving.wanted import WantedOf, identity, plan_of, wanted_of
from modelserve.types import DeploymentState, ModelVersion, Pointer, PoolStatus

_log = logging.getLogger("modelserve")
_GONE_BACK_S: Final = 60.0  # for which a lower generation has to be read before it is believed
_NOT_REGISTERED: Final = 0  # the generation of a model that there is not: the first change makes it 1
_NOTHING_THERE: Final = "no such model is registered yet"
_NOTHING_IN_PRODUCTION: Final = "no version of it is in production; promote one"


class Deployments(Protocol):
    """What the reconciler reads of a registry."""

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener`` on changes that this process makes; return what ends the subscription."""
        ...

    def pointers(self, names: Collection[str] | None = None) -> Mapping[str, Pointer]:
        """Return where each model stands, or each of ``names`` that there is; asked at every poll."""
        ...

    def deployments(self, names: Collection[str] | None = None) -> Mapping[str, DeploymentState]:
        """Return what is wanted of each model, or of each of ``names`` that there is, as of one moment."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """Where one model stands here.

    ``wanted`` and ``applied`` are generations: the one last read, and the one served. ``target`` is the version wanted
    in production, ``production`` the one that answers; they differ while the former loads, or when it was refused.
    ``pool`` is the one of the latter. ``stale`` says since when the registry has not confirmed what is served: the time
    of the first look at which it could not be read, or of the snapshot that this server started from. ``warnings`` are
    what of the model's options cannot work, by what its warm-up took. ``roles`` are the versions wanted, each with
    a load of its own, the most important first; ``ready``, ``loading`` and ``problem`` are about production alone.
    """

    model_name: str
    ready: bool
    wanted: int
    applied: int
    target: str | None
    production: str | None
    previous: str | None
    loading: str | None
    problem: str | None
    queue_depth: int
    pool: PoolStatus | None
    stale: dt.datetime | None = None
    warnings: tuple[str, ...] = ()
    roles: tuple[RoleStatus, ...] = ()


class ModelReconciler:
    """Keeps one model as it is wanted.

    ``wanted_of`` says which versions a state of the registry wants loaded. Each is loaded by itself: one that fails or
    is slow holds up no other.
    """

    def __init__(
        self,
        model_name: str,
        options: ModelOptions,
        *,
        loader: Loader,
        disk: DaemonExecutor,
        observers: Observers,
        snapshots: Snapshots | None,
        wanted_of: WantedOf = wanted_of,
    ) -> None:
        self._model_name = model_name
        self._options = options
        self._disk = disk
        self._observers = observers
        self._snapshots = snapshots
        self._state: DeploymentState | None = None
        self._stand_in: Snapshot | None = None
        self._saved: DeploymentState | None = None
        self._seen: Pointer | None = None  # where the registry stood when it was last read and believed
        self._behind_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._wanted_of = wanted_of
        self._loads = Loads(model_name, options, loader=loader, observers=observers, notify=self._step)
        self._saving: set[asyncio.Task[None]] = set()
        self.deployment: Deployment | None = None
        self.wanted = 0
        self.problem: str | None = None
        self.tried = asyncio.Event()

    # -- what is wanted ------------------------------------------------------------------------------------

    def want(self, state: DeploymentState) -> None:
        """Work towards a state that was read of the registry just now."""
        self._stand_in = self._seen = None
        if self.is_idle:
            self._state = None  # there may be something to serve now; until that is believed, nothing is known
        if self._is_foreign(state) or self._is_behind(state):
            return
        self.wanted = state.generation
        self._seen = Pointer(state.generation, state.production.id if state.production else None)
        self._work_towards(state)

    def stand_in(self, snapshot: Snapshot) -> None:
        """Work towards a snapshot until the registry can be read, if there is nothing better."""
        nothing = self.deployment is None and self._loading is None
        if nothing and snapshot.state.production is not None and snapshot.state.generation >= self.wanted:
            self._stand_in, self._saved, self._seen = snapshot, snapshot.state, None
            self.wanted = snapshot.state.generation
            self._work_towards(snapshot.state)

    def absent(self) -> None:
        """Note that the registry has no such model; one that it had before has gone back to nothing."""
        nothing = DeploymentState(
            model_name=self._model_name, generation=_NOT_REGISTERED, production=None, previous=None
        )
        self.want(nothing)

    def unknown(self, problem: str) -> None:
        """Note why it could not be read what is wanted, while it never was."""
        if self._state is None:
            self._nothing_to_serve(problem)

    def unreadable(self, problem: str) -> None:
        """Note that the registry answers, but not for this model. What serves goes on."""
        self._seen = None
        self._object(problem)

    def differs_from(self, pointer: Pointer) -> bool:
        """Whether the model has to be read again, now that a poll found it there."""
        if pointer.generation >= self.wanted:  # a registry that lags now and then has not gone back
            self._behind_since = None
        return self._seen != pointer

    @property
    def target(self) -> str | None:
        """The version that is wanted in production, as last read."""
        return self._state.production.version if self._state and self._state.production else None

    @property
    def is_idle(self) -> bool:
        """Whether nothing serves, and nothing is known to be wanted. What could not be read yet is not idle."""
        return self.deployment is None and self._state is not None and self._state.production is None

    def status(self, lost_since: dt.datetime | None) -> ModelStatus:
        """Return where the model stands; ``lost_since`` is since when the registry has not answered."""
        now = self.deployment
        since = lost_since if self._stand_in is None else self._stand_in.saved_at
        return ModelStatus(
            model_name=self._model_name,
            ready=now is not None and now.production.pool.alive,
            wanted=self.wanted,
            applied=now.generation if now else 0,
            target=self.target,
            production=now.production.meta.version if now else None,
            previous=now.previous.meta.version if now and now.previous else None,
            loading=self._loading,
            problem=self.problem,
            queue_depth=now.production.pool.queue_depth if now else 0,
            pool=now.production.pool.status() if now else None,
            stale=since if now else None,
            warnings=now.production.warnings if now else (),
            roles=self._loads.status(),
        )

    @property
    def _loading(self) -> str | None:
        """The version that is being loaded for production."""
        first = next(iter(self._loads.status()), None)
        return first.version if first is not None and first.loading else None

    async def stop(self) -> None:
        """Stop loading, then drain and free every version."""
        self.tried.set()
        await self._loads.stop()
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing is being freed or saved."""
        await self._loads.settled()
        if self._saving:
            await asyncio.wait(self._saving)

    def abandon(self) -> None:
        """Free the versions without the loop, which has ended."""
        self._loads.abandon()

    # -- one step at a time --------------------------------------------------------------------------------

    def _work_towards(self, state: DeploymentState) -> None:
        self._state = state
        self._step()

    def _step(self) -> None:
        """Move one step towards the wanted state; what ends later takes the next one."""
        try:
            if self._state is None:
                return
            plan = plan_of(self._wanted_of(self._state)) if self._state.production else {}
            self._loads.receive(plan, self._state.generation)
            self._deploy(self._state)
            self._loads.follow(self.deployment)
        except Exception:  # noqa: BLE001  # the other models are not to suffer; the next look reads it again
            _log.exception("failed to reconcile %s, retrying at the next look", self._model_name)
            self._seen = None
            self._nothing_to_serve("it could not be reconciled; see the log")

    def _nothing_to_serve(self, problem: str) -> None:
        """Note why there is nothing to serve, when there is nothing."""
        if self.deployment is None and self._loading is None:
            self.problem = problem
            self.tried.set()

    def _is_foreign(self, state: DeploymentState) -> bool:
        """Whether a row points at another model's version, which was never put into production under this name."""
        for version in (state.production, state.previous):
            if version is not None and version.model_name != self._model_name:
                problem = f"the registry points at version {version.version} of {version.model_name!r} for it"
                self._object(problem)
                return True
        return False

    def _object(self, problem: str) -> None:
        """Say what is wrong with what the registry has of this model, also while another version of it serves."""
        if self.problem != problem:
            _log.error("refused %s: %s; what served before still does", self._model_name, problem)
        self._nothing_to_serve(problem)
        self.problem = problem

    def _is_behind(self, state: DeploymentState) -> bool:
        """Whether a state is older than one that was read before.

        A replica of the database may lag. One that stays behind has been restored, or is another, and is believed.
        """
        if state.generation >= self.wanted:
            self._behind_since = None
            return False
        now = self._loop.time()
        if self._behind_since is None:
            self._behind_since = now
        if now - self._behind_since < _GONE_BACK_S:
            self.problem = (
                f"the registry has gone back from generation {self.wanted} to {state.generation}; "
                f"it is followed if that is still so after {_GONE_BACK_S:.0f} s"
            )
            return True
        _log.warning(
            "following the registry of %s back from generation %d to %d: it stays there",
            self._model_name,
            self.wanted,
            state.generation,
        )
        self._behind_since = None
        return False

    # -- what serves ---------------------------------------------------------------------------------------

    def _deploy(self, state: DeploymentState) -> None:
        """Let what is wanted and loaded serve from now on, in one assignment."""
        before = self.deployment
        if state.production is None:  # what serves goes on: absence takes nothing away
            self.problem = _NOTHING_THERE if state.generation == _NOT_REGISTERED else _NOTHING_IN_PRODUCTION
            self.tried.set()
        elif production := self._loads.loaded.get(identity(state.production)):
            self._take_over(state, production)
        else:
            self._wait_for(state.production)
        self._announce(before, state.generation)

    def _take_over(self, state: DeploymentState, production: LoadedVersion) -> None:
        before = self.deployment
        if before is not None and before.production is not production and self._options.reload == "replace":
            # It has lent a replica until it is freed. Wanted in another role, it is loaded again for that.
            self._loads.free(before.production)
        keeps = state.previous is not None and self._options.keeps_previous
        previous = self._loads.loaded.get(identity(state.previous)) if keeps and state.previous else None
        self.deployment = self._with_others(
            Deployment(
                model_name=self._model_name, generation=state.generation, production=production, previous=previous
            )
        )
        self.problem = None
        self._keep_snapshot(state)
        self.tried.set()

    def _wait_for(self, production: ModelVersion) -> None:
        """Let the version before go on, beside the canary and the shadows that are wanted now."""
        refusal = next(iter(self._loads.status())).problem
        if refusal is not None:
            self.problem = f"version {production.version} was refused: {refusal}"
            self.tried.set()
        if self.deployment is not None:
            self.deployment = self._with_others(self.deployment)

    def _with_others(self, deployment: Deployment) -> Deployment:
        canary, shadows = self._loads.with_role("canary"), self._loads.with_role("shadow")
        return dataclasses.replace(deployment, canary=canary[0] if canary else None, shadows=tuple(shadows))

    def _announce(self, before: Deployment | None, generation: int) -> None:
        """Log and emit which versions have taken up a role."""
        had = () if before is None else before.roles
        for role, version in self.deployment.roles if self.deployment else ():
            if (role, version) not in had:
                name, number = self._model_name, version.meta.version
                _log.info("loaded %s %s, it serves from now on (%s, generation %d)", name, number, role, generation)
                self._observers.emit(VersionLoaded(name, number, generation, role))

    def _keep_snapshot(self, state: DeploymentState) -> None:
        """Keep what is applied for a start without the registry. What fails is tried again at the next resync."""
        if self._snapshots is not None and state != self._saved:
            saving = self._save(self._snapshots, state)
            task = asyncio.create_task(saving, name=f"modelserve-save-{self._model_name}")
            self._saving.add(task)  # a task that nothing holds can be forgotten before it is done
            task.add_done_callback(self._saving.discard)

    async def _save(self, snapshots: Snapshots, state: DeploymentState) -> None:
        with contextlib.suppress(BackendUnavailable):  # a disk that hangs must not keep the server from closing
            if await call_with_timeout(self._disk, snapshots.save, state):
                self._saved = state
