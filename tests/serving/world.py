"""A registry, a loader and a reconciler between them, in virtual time: every fault can be ordered."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import math
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable, LoadFailed, TooLittleMemory
from modelserve.events import Observers
from modelserve.ports import ChangeListener
from modelserve.registry.hints import Hints
from modelserve.resilience.executor import DaemonExecutor
from modelserve.serving.model_reconciler import ModelStatus
from modelserve.serving.reconciler import Reconciler
from modelserve.serving.wanted import Wanted, wanted_of
from modelserve.testing.clock import VirtualTimeLoop
from modelserve.types import Artifact, DeploymentState, ModelVersion, Pointer, Role

YEAR = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def version(number: int, model_name: str = "m") -> ModelVersion:
    """Make a registry's version; nothing of it is ever loaded."""
    return ModelVersion(
        id=number,
        model_name=model_name,
        version=str(number),
        framework="sklearn",
        artifact=Artifact(key="blobs/sha256/" + "0" * 64, sha256="0" * 64, size=1, format="skops"),
        signature={},
        load_options={},
        example=None,
        conversion=None,
        metrics={},
        tags={},
        status="production",
        created_at=YEAR,
    )


class FakeRegistry:
    """One model's deployment, as the real registry would return it."""

    def __init__(self) -> None:
        self.state: DeploymentState | None = None
        self.others: dict[str, DeploymentState] = {}
        self.listeners: list[ChangeListener] = []
        self.reads = 0
        self.down = False
        self.bug: Exception | None = None
        self.unreadable: set[str] = set()
        self.error: Exception = RuntimeError("unforeseen")
        self.was_wanted: list[int] = []
        self.others_at: dict[int, tuple[tuple[Role, int], ...]] = {}
        """The versions that are wanted beside production, by generation."""

    def promote(self, number: int) -> None:
        now = self.state
        self.state = DeploymentState(
            model_name="m",
            generation=1 if now is None else now.generation + 1,
            production=version(number),
            previous=now.production if now else None,
        )
        self.others_at[self.state.generation] = () if now is None else self.others_at[now.generation]
        self.was_wanted.append(number)

    def assign(self, *others: tuple[Role, int]) -> None:
        """Want these versions beside production."""
        self.touch()
        assert self.state is not None
        self.others_at[self.state.generation] = others

    def wanted_of(self, state: DeploymentState) -> Sequence[Wanted]:
        others = self.others_at.get(state.generation, ())
        return *wanted_of(state), *(Wanted(role, version(number)) for role, number in others)

    def touch(self) -> None:
        assert self.state is not None
        generation = self.state.generation
        self.state = dataclasses.replace(self.state, generation=generation + 1)
        self.others_at[generation + 1] = self.others_at.get(generation, ())

    def hint(self, model_name: str | None = "m") -> None:
        for listener in self.listeners:
            listener(model_name)

    def pointers(self, names: Collection[str] | None = None) -> dict[str, Pointer]:
        self._answer()
        return {
            name: Pointer(state.generation, state.production.id if state.production else None)
            for name, state in self._states(names).items()
        }

    def deployments(self, names: Collection[str] | None = None) -> dict[str, DeploymentState]:
        self.reads += 1
        self._answer()
        states = self._states(names)
        if not self.unreadable.isdisjoint(states):
            raise self.error
        return states

    def _states(self, names: Collection[str] | None) -> dict[str, DeploymentState]:
        found = dict(self.others)
        if self.state is not None:
            found["m"] = self.state
        return {name: state for name, state in found.items() if names is None or name in names}

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def _answer(self) -> None:
        if self.bug is not None:
            raise self.bug
        if self.down:
            raise BackendUnavailable("registry database", "it is down")


class FakePool:
    alive = True
    queue_depth = 0

    def status(self) -> None:
        """Return nothing."""


class FakeVersion:
    """Stands where a loaded version stands."""

    def __init__(self, meta: ModelVersion) -> None:
        self.meta = meta
        self.pool = FakePool()
        self.warnings = ()
        self.unloaded = False
        self.busy: asyncio.Event | None = None

    async def unload(self) -> None:
        if self.busy is not None:
            await self.busy.wait()
        assert not self.unloaded
        self.unloaded = True


class FakeLoader:
    """Loads a version in as many virtual seconds as a test says, or fails."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.failing: set[int] = set()
        self.started: list[int] = []
        self.beside: list[str | None] = []
        self.cancelled: list[int] = []
        self.loaded: list[FakeVersion] = []
        self.roles: list[tuple[Role, int]] = []
        """In which role each load was started."""
        self.memory: float = math.inf
        self.sizes: dict[int, int] = {}
        """What a version takes of the memory, by its number; else nothing."""

    async def load(
        self,
        meta: ModelVersion,
        options: ModelOptions,
        *,
        role: Role,
        beside: FakeVersion | None,
        rivals: Sequence[ModelVersion],
    ) -> FakeVersion:
        self.roles.append((role, meta.id))
        if beside is not None or role != "production":
            self._require_memory(meta.id, [each.id for each in rivals])
        self.started.append(meta.id)
        self.beside.append(beside.meta.version if beside is not None else None)
        try:
            await asyncio.sleep(self.seconds.get(meta.id, 0.1))
        except asyncio.CancelledError:
            self.cancelled.append(meta.id)
            raise
        if meta.id in self.failing:
            raise LoadFailed("it does not load")
        self.loaded.append(FakeVersion(meta))
        return self.loaded[-1]

    def _require_memory(self, number: int, rivals: Sequence[int]) -> None:
        need = sum(self.sizes.get(each, 0) for each in (number, *rivals))
        if need > self.memory - self.taken:
            raise TooLittleMemory(f"{need} would be needed, {self.memory - self.taken} are available")

    @property
    def taken(self) -> int:
        return sum(self.sizes.get(each, 0) for each in self.alive)

    @property
    def alive(self) -> list[int]:
        return sorted(each.meta.id for each in self.loaded if not each.unloaded)


class Inline(DaemonExecutor):
    """Runs at once what is submitted, so that virtual time need not wait for a thread."""

    def __init__(self) -> None:
        super().__init__(1, "inline")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class World:
    """A registry, a loader and the reconciler between them."""

    def __init__(self, **options: Any) -> None:
        self.registry = FakeRegistry()
        self.loader = FakeLoader()
        self.events: list[Any] = []
        observers = Observers()
        observers.subscribe(self.events.append)
        self.elsewhere = Hints()
        self.sql: Any = options.pop("sql", Inline())
        self.reconciler = Reconciler(
            self.registry,
            self.loader,  # type: ignore[arg-type]
            self.sql,
            options.pop("disk", Inline()),
            models=options.pop("models", None),
            observers=observers,
            poll_s=options.pop("poll_s", 1.0),
            hints=self.elsewhere,
            snapshots=options.pop("snapshots", None),
            wanted_of=options.pop("wanted_of", self.registry.wanted_of),
            now=self.time,
        )

    @property
    def serving(self) -> str:
        return self.reconciler["m"].production.meta.version

    @property
    def status(self) -> ModelStatus:
        return self.reconciler.status()[0]

    @staticmethod
    def time() -> dt.datetime:
        """Return the virtual time as a date."""
        return YEAR + dt.timedelta(seconds=asyncio.get_running_loop().time())

    async def start(self, number: int) -> None:
        """Start with this version in production."""
        self.registry.promote(number)
        await self.reconciler.start()

    async def promote(self, number: int) -> None:
        """Put a version into production, and announce it."""
        self.registry.promote(number)
        await self.hint()

    async def assign(self, *others: tuple[Role, int]) -> None:
        """Want these versions beside production, and announce it."""
        self.registry.assign(*others)
        await self.hint()

    @property
    def roles(self) -> dict[Role, list[str]]:
        """The versions that have a role now."""
        found: dict[Role, list[str]] = {}
        for role, each in self.reconciler["m"].roles:
            found.setdefault(role, []).append(each.meta.version)
        return found

    def problem_of(self, number: int) -> str | None:
        """Return why a wanted version is not loaded."""
        return next(each.problem for each in self.status.roles if each.version == str(number))

    async def hint(self, model_name: str | None = "m") -> None:
        self.registry.hint(model_name)
        await asyncio.sleep(0.01)


def run(scenario: Callable[[World], Coroutine[Any, Any, None]], **options: Any) -> World:
    """Play a scenario in virtual time and stop the reconciler after it."""

    async def play() -> World:
        world = World(**options)
        try:
            await scenario(world)
        finally:
            await world.reconciler.stop()
        assert world.loader.alive == []
        return world

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(play())
