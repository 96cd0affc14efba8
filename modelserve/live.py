"""The reconciler: what the registry wants served → what is loaded here.

Level-triggered. A hint or a poll only says "look"; a look reads the wanted state, and every step works towards the
state as it was last read. Lost, repeated, late or reordered hints therefore change nothing. Each model has a keeper
of its own, so that a slow load holds up nobody else; a keeper never waits for a load, so that a newer wish is seen
while an older one is still loading.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Final, Protocol

from modelserve.config import ModelOptions
from modelserve.errors import ModelNotFound, ModelServeError, NotReady, VersionNotFound
from modelserve.events import LoadRejected, Observers, VersionLoaded, VersionUnloaded
from modelserve.loading import LoadedVersion, Loader
from modelserve.ports import ChangeHints
from modelserve.types import DeploymentState, ModelVersion, PoolStatus

_log = logging.getLogger("modelserve")
_FIRST_RETRY_S: Final = 1.0
_LAST_RETRY_S: Final = 60.0


class Deployments(ChangeHints, Protocol):
    """What the reconciler reads of a registry."""

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
    ``pool`` is the one of the latter.
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


class Live:
    """Holds a :class:`Deployment` per served model and keeps it as the registry wants it.

    ``models`` names what to serve and how; None serves every model that has a production version.
    """

    def __init__(
        self,
        registry: Deployments,
        loader: Loader,
        executor: Executor,
        *,
        models: Mapping[str, ModelOptions] | None,
        observers: Observers,
        poll_s: float,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._executor = executor
        self._models = models
        self._observers = observers
        self._poll_s = poll_s
        self._keepers: dict[str, _Keeper] = {}
        self._poll: asyncio.Task[None] | None = None
        self._stopped = False
        self._unsubscribe: Callable[[], None] = _nothing
        self._problem: str | None = None
        self._has_looked = models is not None  # a list of models says which there are without asking

    def __getitem__(self, model_name: str) -> Deployment:
        keeper = self._keepers.get(model_name)
        if keeper is None and self._has_looked:
            raise ModelNotFound(model_name)
        if keeper is None:
            raise NotReady(f"which models there are is not known yet: {self._problem or 'the server is starting'}")
        if keeper.deployment is None:
            raise NotReady(f"model {model_name!r} is not ready: {keeper.problem or 'it is loading'}")
        return keeper.deployment

    async def start(self) -> None:
        """Load everything wanted. Returns once each model serves, was refused, or has nothing to serve."""
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = self._registry.subscribe(self._hint)
        for name in self._models or ():
            self._keep(name)
        await self._look()
        await asyncio.gather(*(keeper.tried.wait() for keeper in self._keepers.values()))
        self._poll = asyncio.create_task(self._look_forever(), name="modelserve-poll")

    async def stop(self) -> None:
        """Stop looking, then drain and free every version."""
        self._stopped = True
        self._unsubscribe()
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.wait([self._poll])
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers.values()))
        self._keepers.clear()

    def status(self) -> list[ModelStatus]:
        """Return the status of every model served here, by name."""
        served = sorted(self._keepers.items())
        return [keeper.status() for _, keeper in served if self._models is not None or keeper.target is not None]

    @property
    def problem(self) -> str | None:
        """Why the registry could not be read at the last look; None when it could."""
        return self._problem

    # -- looking -------------------------------------------------------------------------------------------

    def _hint(self, model_name: str) -> None:
        """A change was announced, from whichever thread made it."""
        self._loop.call_soon_threadsafe(self._nudge, model_name)

    def _nudge(self, model_name: str) -> None:
        if not self._stopped and (self._models is None or model_name in self._models):
            self._keep(model_name).look()

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self._look()

    async def _look(self) -> None:
        try:
            generations = await self._loop.run_in_executor(self._executor, self._registry.generations)
        except ModelServeError as error:
            self._lost(str(error))
            return
        except Exception as error:  # noqa: BLE001  # a poll that ended would leave every model as it is for ever
            _log.exception("the registry could not be read")
            self._lost(f"the registry could not be read: {type(error).__name__}")
            return
        self._problem, self._has_looked = None, True
        for name, generation in generations.items():
            if (self._models is None or name in self._models) and self._keep(name).reached != generation:
                self._keep(name).look()
        for name, keeper in self._keepers.items():
            if name not in generations:
                keeper.nothing_to_serve("no such model is registered yet")

    def _lost(self, problem: str) -> None:
        if self._problem is None:
            _log.error("%s; what is loaded keeps serving", problem)
        self._problem = problem
        for keeper in self._keepers.values():
            keeper.nothing_to_serve(problem)

    def _keep(self, model_name: str) -> _Keeper:
        keeper = self._keepers.get(model_name)
        if keeper is None:
            options = (self._models or {}).get(model_name) or ModelOptions()
            keeper = _Keeper(
                model_name,
                options,
                registry=self._registry,
                loader=self._loader,
                executor=self._executor,
                observers=self._observers,
            )
            self._keepers[model_name] = keeper
        return keeper


def _nothing() -> None:
    """Do nothing: what there is to undo before anything was done."""


class _Keeper:
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
    ) -> None:
        self._model_name = model_name
        self._options = options
        self._registry = registry
        self._loader = loader
        self._executor = executor
        self._observers = observers
        self._loop = asyncio.get_running_loop()
        self._loaded: dict[int, LoadedVersion] = {}
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
        if self.deployment is None and self._loading is None:
            self.problem = problem
            self.tried.set()

    def status(self) -> ModelStatus:
        now = self.deployment
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
        )

    async def stop(self) -> None:
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
        state = await self._loop.run_in_executor(self._executor, self._registry.deployment, self._model_name)
        if state.generation < self.wanted:
            return
        self.wanted = state.generation
        self.target = state.production.version if state.production else None
        self._take_in()
        if state.production is None:
            self.nothing_to_serve("no version of it is in production; promote one")
            self.reached = state.generation
        elif state.production.id in self._loaded:
            self._swap(state, self._loaded[state.production.id])
        else:
            self._start_loading(state.production)
        self._retire_unwanted(state)

    def _start_loading(self, version: ModelVersion) -> None:
        if self._loading is not None:
            if self._loading[0].id == version.id:
                return
            self._abandon(self._loading[1])
        if self._refused == version and self._pause is not None:  # one that was signed since is tried at once
            return
        load = self._loader.load(version, self._options)
        task = asyncio.create_task(load, name=f"modelserve-load-{self._model_name}")
        task.add_done_callback(lambda _: self.look())
        self._loading = (version, task)

    def _abandon(self, load: asyncio.Task[LoadedVersion]) -> None:
        """Cancel a load that a newer wish made pointless; it frees what it had by itself."""
        load.cancel()
        self._in_background(load)

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
            self._loaded[version.id] = task.result()
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
        previous = self._loaded.get(state.previous.id) if state.previous and self._options.keep_previous else None
        before, self.deployment = self.deployment, Deployment(self._model_name, state.generation, production, previous)
        self.problem = None
        self.reached = state.generation
        self.tried.set()
        if before is None or before.production is not production:
            _log.info(
                "%s %s serves from now on (generation %d)", self._model_name, production.meta.version, state.generation
            )
            self._observers.emit(VersionLoaded(self._model_name, production.meta.version, state.generation))

    # -- what is no longer wanted --------------------------------------------------------------------------

    def _retire_unwanted(self, state: DeploymentState) -> None:
        now = self.deployment
        kept: set[Any] = {now.production, now.previous} if now else set()
        if state.production is not None and state.production.id in self._loaded:
            kept.add(self._loaded[state.production.id])
        for version in list(self._loaded.values()):
            if version not in kept:
                self._retire(version)

    def _retire(self, version: LoadedVersion) -> None:
        del self._loaded[version.meta.id]
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
