"""The reconciler: what the registry wants served → what is loaded here.

Level-triggered. A hint or a poll only says "look"; a look reads the wanted state, and every step works towards the
state as it was last read. Lost, repeated, late or reordered hints therefore change nothing. Each model has a reconciler
of its own, so that a slow load holds up no other model.

A look is one question to the registry, or two, however many models there are: a database may be far away.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final

from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable, ModelNotFound, ModelServeError, NotReady
from modelserve.events import Observers
from modelserve.ports import ChangeHints
from modelserve.resilience.executor import DaemonExecutor, call_with_timeout
from modelserve.serving.deployment import Deployment
from modelserve.serving.loader import Loader
from modelserve.serving.model_reconciler import Deployments, ModelReconciler, ModelStatus
from modelserve.serving.snapshots import Snapshot, Snapshots
from modelserve.serving.wanted import WantedOf, wanted_of
from modelserve.types import DeploymentState, Pointer

_log = logging.getLogger("modelserve")
_RESYNC_S: Final = 60.0  # between two looks at models whose generation has not changed


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Reconciler:
    """Holds a :class:`Deployment` per served model and keeps it as the registry wants it.

    ``models`` names what to serve and how; None serves every model that has a production version. ``hints`` announces
    changes by other processes; without it they are found by polling. ``snapshots`` keep what was applied, and stand in
    for a registry that cannot be read when there is nothing to serve yet. The registry is asked on ``sql``; the
    snapshots are read and written on ``disk``, which waits for no database.
    """

    def __init__(
        self,
        registry: Deployments,
        loader: Loader,
        sql: DaemonExecutor,
        disk: DaemonExecutor,
        *,
        models: Mapping[str, ModelOptions] | None,
        observers: Observers,
        poll_s: float,
        hints: ChangeHints | None = None,
        snapshots: Snapshots | None = None,
        wanted_of: WantedOf = wanted_of,
        now: Callable[[], dt.datetime] = _utc_now,
    ) -> None:
        self._registry = registry
        self._hints = hints
        self._heard: set[str | None] = set()
        self._asked: set[str | None] = set()
        self._look_now = asyncio.Event()
        self._loader = loader
        self._sql = sql
        self._disk = disk
        self._snapshots = snapshots
        self._wanted_of = wanted_of
        self._now = now
        self._models = models
        self._observers = observers
        self._poll_s = poll_s
        self._reconcilers: dict[str, ModelReconciler] = {}
        self._poll: asyncio.Task[None] | None = None
        self._stopped = False
        self._subscriptions: list[Callable[[], None]] = []
        self._problem: str | None = None
        self._lost_since: dt.datetime | None = None
        self._poll_at = 0.0
        self._resync_at = 0.0
        self._found: Mapping[str, object] = {}
        self._has_looked = models is not None  # a list of models says which there are without asking

    def __getitem__(self, model_name: str) -> Deployment:
        model = self._reconcilers.get(model_name)
        if model is None:
            raise self._not_served(model_name)
        if model.deployment is None:
            raise NotReady(f"model {model_name!r} is not ready: {model.problem or 'it is loading'}")
        return model.deployment

    def _not_served(self, model_name: str) -> ModelServeError:
        if not self._has_looked:
            return NotReady(f"which models there are is not known yet: {self._problem or 'the server is starting'}")
        if self._models is None and model_name in self._found:
            return NotReady(f"model {model_name!r} is not ready: no version of it is in production; promote one")
        return ModelNotFound(model_name)

    async def start(self) -> None:
        """Load everything wanted. Returns once each model serves, was refused, or has nothing to serve."""
        self._loop = asyncio.get_running_loop()
        sources = (self._registry,) if self._hints is None else (self._registry, self._hints)
        self._subscriptions = [source.subscribe(self._hint) for source in sources]
        for name in self._models or ():
            self._reconciler_of(name)
        await self._look()
        self._poll = asyncio.create_task(self._look_forever(), name="modelserve-poll")
        await asyncio.gather(*(model.tried.wait() for model in self._reconcilers.values()))

    async def stop(self) -> None:
        """Stop looking, then drain and free every version."""
        self._stop_listening()
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.wait([self._poll])
        await asyncio.gather(*(model.stop() for model in self._reconcilers.values()))
        self._reconcilers.clear()

    def abandon(self) -> None:
        """Free what can be freed without the loop, which has ended."""
        self._stop_listening()
        for model in self._reconcilers.values():
            model.abandon()

    def status(self) -> list[ModelStatus]:
        """Return the status of every model served here, by name; of one that is to be, but could not be read, too."""
        return [
            model.status(self._lost_since)
            for _, model in sorted(self._reconcilers.items())
            if self._models is not None or not model.is_idle
        ]

    def status_of(self, model_name: str) -> ModelStatus:
        """Return the status of one model served here. Raises ``ModelNotFound``."""
        model = self._reconcilers.get(model_name)
        if model is None or (self._models is None and model.target is None):
            raise ModelNotFound(model_name)
        return model.status(self._lost_since)

    @property
    def problem(self) -> str | None:
        """Why the registry could not be read at the last look; None when it could."""
        return self._problem

    # -- looking -------------------------------------------------------------------------------------------

    def _hint(self, model_name: str | None) -> None:
        """A change was announced, from whichever thread heard of it."""
        if self._stopped or model_name in self._heard:  # a flood costs the loop one call, not one each
            return
        self._heard.add(model_name)
        self._loop.call_soon_threadsafe(self._nudge, model_name)

    def _nudge(self, model_name: str | None) -> None:
        self._heard.discard(model_name)  # before the look: what is heard from now on asks for another
        if model_name is not None and not self._serves(model_name):
            return
        # A name says too little of what the registry has, and less when it could not be read before.
        is_enough = model_name in self._reconcilers and self._problem is None
        self._asked.add(model_name if is_enough else None)
        self._look_now.set()

    def _serves(self, model_name: str) -> bool:
        return self._models is None or model_name in self._models

    def _stop_listening(self) -> None:
        self._stopped = True
        for unsubscribe in self._subscriptions:
            unsubscribe()

    async def _look_forever(self) -> None:
        while True:
            # Not wait_for: in Python 3.11 it swallows a cancellation that meets a hint, and the server never closes.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._poll_at):
                    await self._look_now.wait()
            self._look_now.clear()
            await self._look()

    async def _look(self) -> None:
        try:
            await self._read()
        except ModelServeError as error:
            stand_in = await self._snapshots_of(error) if self._problem is None else {}
            self._lost(str(error), stand_in)
        except Exception as error:  # noqa: BLE001  # a poll that ended would leave every model as it is for ever
            _log.exception("the registry could not be read")
            self._lost(f"the registry could not be read: {type(error).__name__}", {})
        else:
            self._problem, self._lost_since = None, None

    async def _read(self) -> None:
        """Read what may have changed: of the models that hints have named, or of all when that is due."""
        asked, self._asked = self._asked, set()
        if asked and None not in asked and self._loop.time() < self._poll_at:
            self._pass_on(await self._states([name for name in asked if name is not None]))
            return
        try:
            await self._read_all()
        finally:
            self._poll_at = self._loop.time() + self._poll_s

    async def _read_all(self) -> None:
        """Compare where all models stand with what was read of them, and read what differs.

        At first, and once a minute, everything is read: a registry that was replaced can stand the same by chance.
        """
        if self._loop.time() < self._resync_at:
            pointers = await call_with_timeout(self._sql, self._registry.pointers, self._models)
            self._know(pointers)
            self._pass_on(await self._states(self._changed(pointers)))
            return
        states = await self._states(self._models)
        self._resync_at = self._loop.time() + _RESYNC_S
        self._know(states)
        self._pass_on(states)

    def _know(self, found: Mapping[str, object]) -> None:
        """Note which models the registry has."""
        self._has_looked, self._found = True, found
        for name, model in self._reconcilers.items():
            if name not in found:
                model.absent()

    def _changed(self, pointers: Mapping[str, Pointer]) -> list[str]:
        """Return the models of which something else was read last, or nothing yet; these count from now on."""
        for name in [name for name, pointer in pointers.items() if pointer.production_id is not None]:
            self._reconciler_of(name)
        return [
            name
            for name, model in self._reconcilers.items()
            if (pointer := pointers.get(name)) is not None and model.differs_from(pointer)
        ]

    async def _states(self, names: Collection[str] | None) -> Mapping[str, DeploymentState | None]:
        """Read what is wanted in one question; None for a model whose rows cannot be read.

        Such a model is found by asking for halves, so that it does not hide the others.
        """
        if names is not None and not names:
            return {}
        try:
            return await call_with_timeout(self._sql, self._registry.deployments, names)
        except ModelServeError:
            raise
        except Exception:  # noqa: BLE001  # what a row can hold is not ours to foresee
            if names is not None and len(names) == 1:
                _log.exception("failed to read what the registry has of %s", *names)
                return dict.fromkeys(names)
        each = list(names if names is not None else await call_with_timeout(self._sql, self._registry.pointers))
        half = len(each) // 2
        return {**await self._states(each[:half]), **await self._states(each[half:])}

    def _pass_on(self, states: Mapping[str, DeploymentState | None]) -> None:
        """Give each model's reconciler what is wanted; a model without a version in production needs none."""
        for name, state in states.items():
            if state is None:
                self._reconciler_of(name).unreadable("the registry's rows of it cannot be read; see the log")
            elif name in self._reconcilers or state.production is not None:
                self._reconciler_of(name).want(state)

    async def _snapshots_of(self, error: ModelServeError) -> Mapping[str, Snapshot]:
        """Return what can stand in for a registry that does not answer; nothing can for one that refuses."""
        if self._snapshots is None or not isinstance(error, BackendUnavailable):
            return {}
        try:
            return await call_with_timeout(self._disk, self._snapshots.load)
        except BackendUnavailable:  # the disk hangs
            return {}

    def _lost(self, problem: str, stand_in: Mapping[str, Snapshot]) -> None:
        if self._problem is None:
            _log.error("%s; what is loaded keeps serving", problem)
            self._lost_since = self._now()
        self._problem = problem
        for name, snapshot in stand_in.items():
            if self._serves(name):
                self._reconciler_of(name).stand_in(snapshot)
        for model in self._reconcilers.values():
            model.unknown(problem)

    def _reconciler_of(self, model_name: str) -> ModelReconciler:
        model = self._reconcilers.get(model_name)
        if model is None:
            options = (self._models or {}).get(model_name) or ModelOptions()
            model = ModelReconciler(
                model_name,
                options,
                loader=self._loader,
                disk=self._disk,
                observers=self._observers,
                snapshots=self._snapshots,
                wanted_of=self._wanted_of,
            )
            self._reconcilers[model_name] = model
        return model
