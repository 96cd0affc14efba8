"""One model kept as it is wanted: what is wanted is read, and every step works towards it as it was last read.

A keeper never waits for a load, so that a newer wish is seen while an older one is still loading.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, Protocol, TypeAlias

from modelserve.asking import answered
from modelserve.config import ModelOptions
from modelserve.errors import ModelServeError, VersionNotFound
from modelserve.events import LoadRejected, Observers, VersionLoaded, VersionUnloaded
from modelserve.loading import LoadedVersion, Loader
from modelserve.ports import ChangeListener
from modelserve.snapshots import Snapshot, Snapshots
from modelserve.types import DeploymentState, ModelVersion, PoolStatus

_log = logging.getLogger("modelserve")
_FIRST_RETRY_S: Final = 1.0
_LAST_RETRY_S: Final = 60.0
_GONE_BACK_S: Final = 60.0  # for which a lower generation has to be read before it is believed


class Deployments(Protocol):
    """What the reconciler reads of a registry."""

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener`` on changes that this process makes; return what ends the subscription."""
        ...

    def generations(self) -> dict[str, int]:
        """Return each model's generation; asked at every poll."""
        ...

    def deployment(self, model_name: str) -> DeploymentState:
        """Return what is wanted of a model as of one moment. Raises ``ModelNotFound``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Deployment:
    """An immutable snapshot of what serves one model. A request keeps the snapshot that it took."""

    model_name: str
    generation: int
    production: LoadedVersion
    previous: LoadedVersion | None

    def choose(self, version: str | None) -> LoadedVersion:
        """Return the version that answers: production, or the one asked for if it is loaded."""
        if version is None or version == self.production.meta.version:
            return self.production
        if self.previous is not None and version == self.previous.meta.version:
            return self.previous
        raise VersionNotFound(self.model_name, version)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """Where one model stands here.

    ``wanted`` and ``applied`` are generations: the one last read, and the one served. ``target`` is the version wanted
    in production, ``production`` the one that answers; they differ while the former loads, or when it was refused.
    ``pool`` is the one of the latter. ``stale`` says since when the registry has not confirmed what is served: the time
    of the first look at which it could not be read, or of the snapshot that this server started from.
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


_Identity: TypeAlias = tuple[int, str, str, dt.datetime]


def _identity(version: ModelVersion) -> _Identity:
    """Return what tells a version from any other, also from one that has its id in another database."""
    return version.id, version.version, version.artifact.sha256, version.created_at


class Keeper:
    """Keeps one model as it is wanted."""

    def __init__(
        self,
        model_name: str,
        options: ModelOptions,
        *,
        registry: Deployments,
        loader: Loader,
        executor: Executor,
        observers: Observers,
        snapshots: Snapshots | None,
    ) -> None:
        self._model_name = model_name
        self._options = options
        self._registry = registry
        self._loader = loader
        self._executor = executor
        self._observers = observers
        self._snapshots = snapshots
        self._stand_in: Snapshot | None = None
        self._saved: DeploymentState | None = None
        self._behind_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._loaded: dict[_Identity, LoadedVersion] = {}
        self._loading: tuple[ModelVersion, asyncio.Task[LoadedVersion]] | None = None
        self._refused: ModelVersion | None = None
        self._retry_s = _FIRST_RETRY_S
        self._pause: asyncio.TimerHandle | None = None
        self._retiring: set[asyncio.Task[Any]] = set()
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._keep(), name=f"modelserve-keeper-{model_name}")
        self.deployment: Deployment | None = None
        self.wanted = 0
        self.reached = 0
        """The last generation at which all was as wanted. Until it is the newest, every poll asks for a step."""
        self.target: str | None = None
        """The version that the registry wants in production, as last read."""
        self.problem: str | None = None
        self.tried = asyncio.Event()

    def look(self) -> None:
        """Have the wanted state read again, soon."""
        self._news.set()

    def nothing_to_serve(self, problem: str) -> None:
        """Note why there is nothing to serve, when there is nothing."""
        if self.deployment is None and self._loading is None and self._stand_in is None:
            self.problem = problem
            self.tried.set()

    def stand_in(self, snapshot: Snapshot) -> None:
        """Work towards a snapshot until the registry can be read, if there is nothing better."""
        nothing = self.deployment is None and self._loading is None
        if nothing and snapshot.state.production is not None and snapshot.state.generation >= self.wanted:
            self._stand_in = snapshot
            self.look()

    def has_read(self, generation: int) -> None:
        """Note a generation that a poll found: a registry that lags now and then has not gone back."""
        if generation >= self.wanted:
            self._behind_since = None

    def ask_registry(self) -> None:
        """Read the registry again from the next step on: it answers."""
        self._stand_in = None

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
        )

    async def stop(self) -> None:
        """Stop looking and loading, then drain and free every version."""
        self.tried.set()
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._pause is not None:
            self._pause.cancel()
        if self._loading is not None:
            self._loading[1].cancel()
            await asyncio.wait([self._loading[1]])
            self._take_in()
        for version in list(self._loaded.values()):
            self._retire(version)
        if self._retiring:
            await asyncio.wait(self._retiring)

    # -- one step at a time --------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._step()
            except ModelServeError as error:
                self.nothing_to_serve(str(error))
            except Exception:  # noqa: BLE001  # a keeper that ended would leave its model as it is for ever
                _log.exception("reconciling %s failed; it is tried again at the next look", self._model_name)
                self.nothing_to_serve("it could not be reconciled; see the log")

    async def _step(self) -> None:
        """Read the wanted state and move one step towards it; whatever finishes later asks for the next step."""
        state = await self._read()
        if self._is_foreign(state) or self._is_behind(state):
            return
        self.wanted = state.generation
        self.target = state.production.version if state.production else None
        self._take_in()
        if state.production is None:
            self.nothing_to_serve("no version of it is in production; promote one")
            self.reached = state.generation
        elif (identity := _identity(state.production)) in self._loaded:
            self._abandon_load()
            self._swap(state, self._loaded[identity])
        else:
            self._start_loading(state.production)
        self._retire_unwanted(state)

    async def _read(self) -> DeploymentState:
        if self._stand_in is not None:
            return self._stand_in.state
        return await answered(self._executor, self._registry.deployment, self._model_name)

    def _is_foreign(self, state: DeploymentState) -> bool:
        """Whether a row points at another model's version, which nobody has put into production under this name."""
        for version in (state.production, state.previous):
            if version is not None and version.model_name != self._model_name:
                problem = f"the registry points at version {version.version} of {version.model_name!r} for it"
                if self.problem != problem:
                    _log.error("%s: %s; it is not served under this name", self._model_name, problem)
                self.nothing_to_serve(problem)
                self.problem = problem
                return True
        return False

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
        task.add_done_callback(lambda _: self.look())
        self._loading = (version, task)

    def _abandon_load(self) -> None:
        """Cancel a load that a newer wish made pointless; it frees what it had by itself."""
        if self._loading is not None:
            self._loading[1].cancel()
            self._in_background(self._loading[1])
            self._loading = None

    def _take_in(self) -> None:
        """Receive a finished load: the version, or the reason why not."""
        if self._loading is None or not self._loading[1].done():
            return
        version, task = self._loading
        self._loading = None
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._loaded[_identity(version)] = task.result()
            self._refused = None
        else:
            self._refuse(version, error)

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
        self.look()

    def _swap(self, state: DeploymentState, production: LoadedVersion) -> None:
        """Let the wanted version answer from now on, in one assignment."""
        previous = (
            self._loaded.get(_identity(state.previous)) if state.previous and self._options.keeps_previous else None
        )
        before, self.deployment = self.deployment, Deployment(self._model_name, state.generation, production, previous)
        self.problem = None
        if self._stand_in is None:
            self.reached = state.generation
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
        if await self._loop.run_in_executor(self._executor, snapshots.save, state):
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
