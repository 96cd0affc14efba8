"""One model kept as it is wanted: every step works towards the state that was last read of the registry.

A keeper waits for nothing, neither for a read nor for a load: it takes a step when a state is read, when a load ends
and when a pause is over. So whatever fails elsewhere, a load that ended is taken in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol, TypeAlias

from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable, LoadFailed
from modelserve.events import LoadRejected, Observers, VersionLoaded, VersionUnloaded
from modelserve.ports import ChangeListener
from modelserve.resilience.executor import DaemonExecutor, call_with_timeout
from modelserve.serving.deployment import Deployment
from modelserve.serving.loader import Loader
from modelserve.serving.snapshots import Snapshot, Snapshots
from modelserve.serving.version import LoadedVersion
from modelserve.types import DeploymentState, ModelVersion, Pointer, PoolStatus

_log = logging.getLogger("modelserve")
_FIRST_RETRY_S: Final = 1.0
_LAST_RETRY_S: Final = 60.0
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
    what of the model's options cannot work, by what its warm-up took.
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


_Identity: TypeAlias = tuple[int, str, str, dt.datetime]


def _identity(version: ModelVersion) -> _Identity:
    """Return what tells a version from any other, also from one that has its id in another database."""
    return version.id, version.version, version.artifact.sha256, version.created_at


class ModelReconciler:
    """Keeps one model as it is wanted."""

    def __init__(
        self,
        model_name: str,
        options: ModelOptions,
        *,
        loader: Loader,
        disk: DaemonExecutor,
        observers: Observers,
        snapshots: Snapshots | None,
    ) -> None:
        self._model_name = model_name
        self._options = options
        self._loader = loader
        self._disk = disk
        self._observers = observers
        self._snapshots = snapshots
        self._state: DeploymentState | None = None
        self._stand_in: Snapshot | None = None
        self._saved: DeploymentState | None = None
        self._seen: Pointer | None = None  # where the registry stood when it was last read and believed
        self._behind_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._loaded: dict[_Identity, LoadedVersion] = {}
        self._loading: tuple[ModelVersion, asyncio.Task[LoadedVersion]] | None = None
        self._refused: ModelVersion | None = None
        self._retry_s = _FIRST_RETRY_S
        self._pause: asyncio.TimerHandle | None = None
        self._retiring: set[asyncio.Task[Any]] = set()
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
            loading=self._loading[0].version if self._loading else None,
            problem=self.problem,
            queue_depth=now.production.pool.queue_depth if now else 0,
            pool=now.production.pool.status() if now else None,
            stale=since if now else None,
            warnings=now.production.warnings if now else (),
        )

    async def stop(self) -> None:
        """Stop loading, then drain and free every version."""
        self.tried.set()
        self._abandon_load()
        if self._pause is not None:
            self._pause.cancel()
        for version in list(self._loaded.values()):
            self._retire(version)
        if self._retiring:
            await asyncio.wait(self._retiring)

    def abandon(self) -> None:
        """Free the versions without the loop, which has ended."""
        for version in self._loaded.values():
            version.abandon()

    # -- one step at a time --------------------------------------------------------------------------------

    def _work_towards(self, state: DeploymentState) -> None:
        self._state = state
        self._step()

    def _step(self) -> None:
        """Move one step towards the wanted state; what ends later takes the next one."""
        try:
            self._take_in()
            if self._state is not None:
                self._approach(self._state)
        except Exception:  # noqa: BLE001  # the other models are not to suffer; the next look reads it again
            _log.exception("failed to reconcile %s; it is tried again at the next look", self._model_name)
            self._seen = None
            self._nothing_to_serve("it could not be reconciled; see the log")

    def _approach(self, state: DeploymentState) -> None:
        if state.production is None:
            self._abandon_load()  # what serves goes on: absence takes nothing away
            self.problem = _NOTHING_THERE if state.generation == _NOT_REGISTERED else _NOTHING_IN_PRODUCTION
            self.tried.set()
        elif (identity := _identity(state.production)) in self._loaded:
            self._abandon_load()
            self._swap(state, self._loaded[identity])
        else:
            self._start_loading(state.production)
        self._retire_unwanted(state)

    def _nothing_to_serve(self, problem: str) -> None:
        """Note why there is nothing to serve, when there is nothing."""
        if self.deployment is None and self._loading is None:
            self.problem = problem
            self.tried.set()

    def _is_foreign(self, state: DeploymentState) -> bool:
        """Whether a row points at another model's version, which nobody has put into production under this name."""
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
        told = "%s: the registry has gone back from generation %d to %d and stays there; it is followed"
        _log.warning(told, self._model_name, self.wanted, state.generation)
        self._behind_since = None
        return False

    def _start_loading(self, version: ModelVersion) -> None:
        identity = _identity(version)
        if self._loading is not None:
            if _identity(self._loading[0]) == identity:
                return
            self._abandon_load()
        if self._refused == version and self._pause is not None:  # one that was signed since is tried at once
            return
        load = self._loader.load(version, self._options, beside=self.deployment.production if self.deployment else None)
        task = asyncio.create_task(load, name=f"modelserve-load-{self._model_name}")
        task.add_done_callback(self._load_ended)
        self._loading = (version, task)

    def _load_ended(self, task: asyncio.Task[LoadedVersion]) -> None:
        if self._loading is not None and self._loading[1] is task:
            self._step()

    def _abandon_load(self) -> None:
        """Cancel a load that a newer wish made pointless; it frees what it had by itself."""
        self._take_in()  # it may have ended in this very turn of the loop
        if self._loading is not None:
            task, self._loading = self._loading[1], None
            task.cancel()
            self._in_background(task)

    def _take_in(self) -> None:
        """Receive a finished load: the version, or the reason why not."""
        if self._loading is None or not self._loading[1].done():
            return
        version, task = self._loading
        self._loading = None
        if task.cancelled():  # by the model's own code: a load that is abandoned is not waited for
            self._refuse(version, LoadFailed("the load was cancelled"))
        elif (error := task.exception()) is not None:
            self._refuse(version, error)
        else:
            self._loaded[_identity(version)] = task.result()
            self._refused = None

    def _refuse(self, version: ModelVersion, error: BaseException) -> None:
        self._retry_s = min(_LAST_RETRY_S, self._retry_s * 2) if self._refused == version else _FIRST_RETRY_S
        self._refused = version
        if self._pause is not None:
            self._pause.cancel()
        self._pause = self._loop.call_later(self._retry_s, self._retry)
        self.problem = f"version {version.version} was refused: {error}"
        self.tried.set()
        told = "%s %s was refused, what served before still does; next try in %.0f s: %s"
        _log.error(told, self._model_name, version.version, self._retry_s, error)
        if isinstance(error, Exception):
            self._observers.emit(LoadRejected(self._model_name, version.version, self.wanted, error, self._retry_s))

    def _retry(self) -> None:
        self._pause = None
        self._step()

    def _swap(self, state: DeploymentState, production: LoadedVersion) -> None:
        """Let the wanted version answer from now on, in one assignment."""
        previous = (
            self._loaded.get(_identity(state.previous)) if state.previous and self._options.keeps_previous else None
        )
        before, self.deployment = (
            self.deployment,
            Deployment(
                model_name=self._model_name, generation=state.generation, production=production, previous=previous
            ),
        )
        self.problem = None
        self._keep_snapshot(state)
        self.tried.set()
        if before is None or before.production is not production:
            _log.info(
                "%s %s serves from now on (generation %d)", self._model_name, production.meta.version, state.generation
            )
            self._observers.emit(VersionLoaded(self._model_name, production.meta.version, state.generation))

    def _keep_snapshot(self, state: DeploymentState) -> None:
        """Keep what is applied for a start without the registry. What fails is tried again at the next resync."""
        if self._snapshots is not None and state != self._saved:
            saving = self._save(self._snapshots, state)
            self._in_background(asyncio.create_task(saving, name=f"modelserve-save-{self._model_name}"))

    async def _save(self, snapshots: Snapshots, state: DeploymentState) -> None:
        with contextlib.suppress(BackendUnavailable):  # a disk that hangs must not keep the server from closing
            if await call_with_timeout(self._disk, snapshots.save, state):
                self._saved = state

    # -- what is no longer wanted --------------------------------------------------------------------------

    def _retire_unwanted(self, state: DeploymentState) -> None:
        now = self.deployment
        kept: set[Any] = {now.production, now.previous} if now else set()
        if state.production is not None and _identity(state.production) in self._loaded:
            kept.add(self._loaded[_identity(state.production)])
        for version in list(self._loaded.values()):
            if version not in kept:
                self._retire(version)

    def _retire(self, version: LoadedVersion) -> None:
        del self._loaded[_identity(version.meta)]
        unload = self._unload(version)
        self._in_background(asyncio.create_task(unload, name=f"modelserve-unload-{self._model_name}"))

    def _in_background(self, task: asyncio.Task[Any]) -> None:
        """Keep a task from being forgotten until it is done."""
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _unload(self, version: LoadedVersion) -> None:
        try:
            await version.unload()
        except Exception:  # noqa: BLE001  # nobody waits for an unload: what went wrong is told to the log
            _log.exception("%s %s could not be freed", self._model_name, version.meta.version)
            return
        self._observers.emit(VersionUnloaded(self._model_name, version.meta.version))
