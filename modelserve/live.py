"""The reconciler: what the registry wants served → what is loaded here.

Level-triggered. A hint or a poll only says "look"; a look reads the wanted state, and every step works towards the
state as it was last read. Lost, repeated, late or reordered hints therefore change nothing. Each model has a keeper
of its own, so that a slow load holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Final

from modelserve.asking import answered
from modelserve.config import ModelOptions
from modelserve.errors import BackendUnavailable, ModelNotFound, ModelServeError, NotReady
from modelserve.events import Observers
from modelserve.keeper import Deployment, Deployments, Keeper, ModelStatus
from modelserve.loading import Loader
from modelserve.ports import ChangeHints
from modelserve.snapshots import Snapshot, Snapshots

_log = logging.getLogger("modelserve")
_RESYNC_S: Final = 60.0  # between two looks at models whose generation has not changed


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Live:
    """Holds a :class:`Deployment` per served model and keeps it as the registry wants it.

    ``models`` names what to serve and how; None serves every model that has a production version. ``hints`` tells of
    changes by other processes; without it they are found by polling. ``snapshots`` keep what was applied, and stand in
    for a registry that cannot be read when there is nothing to serve yet.
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
        hints: ChangeHints | None = None,
        snapshots: Snapshots | None = None,
        now: Callable[[], dt.datetime] = _utc_now,
    ) -> None:
        self._registry = registry
        self._hints = hints
        self._heard: set[str | None] = set()
        self._look_now = asyncio.Event()
        self._loader = loader
        self._executor = executor
        self._snapshots = snapshots
        self._now = now
        self._models = models
        self._observers = observers
        self._poll_s = poll_s
        self._keepers: dict[str, Keeper] = {}
        self._poll: asyncio.Task[None] | None = None
        self._stopped = False
        self._subscriptions: list[Callable[[], None]] = []
        self._problem: str | None = None
        self._lost_since: dt.datetime | None = None
        self._resynced_at = 0.0
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
        sources = (self._registry,) if self._hints is None else (self._registry, self._hints)
        self._subscriptions = [source.subscribe(self._hint) for source in sources]
        for name in self._models or ():
            self._keep(name)
        await self._look()
        await asyncio.gather(*(keeper.tried.wait() for keeper in self._keepers.values()))
        self._poll = asyncio.create_task(self._look_forever(), name="modelserve-poll")

    async def stop(self) -> None:
        """Stop looking, then drain and free every version."""
        self._stopped = True
        for unsubscribe in self._subscriptions:
            unsubscribe()
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.wait([self._poll])
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers.values()))
        self._keepers.clear()

    def status(self) -> list[ModelStatus]:
        """Return the status of every model served here, by name."""
        served = sorted(self._keepers.items())
        return [
            keeper.status(self._lost_since)
            for _, keeper in served
            if self._models is not None or keeper.target is not None
        ]

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
        if self._problem is not None:  # the registry is there again
            self._look_now.set()
        keeper = None if model_name is None else self._keepers.get(model_name)
        if keeper is not None:
            keeper.look()
        elif model_name is None or self._models is None:  # a name says too little of what the registry has
            self._look_now.set()

    async def _look_forever(self) -> None:
        while True:
            # Not wait_for: in Python 3.11 it swallows a cancellation that meets a hint, and the server never closes.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._look_now.wait()
            self._look_now.clear()
            await self._look()

    async def _look(self) -> None:
        try:
            generations = await answered(self._executor, self._registry.generations)
        except ModelServeError as error:
            was_known = self._problem is None
            self._lost(str(error), stand_in=await self._snapshots_of(error) if was_known else {})
            return
        except Exception as error:  # noqa: BLE001  # a poll that ended would leave every model as it is for ever
            _log.exception("the registry could not be read")
            self._lost(f"the registry could not be read: {type(error).__name__}")
            return
        self._problem, self._lost_since, self._has_looked = None, None, True
        everything = self._is_time_to_resync()
        for keeper in self._keepers.values():
            keeper.ask_registry()
        for name, generation in generations.items():
            if name in self._keepers:
                self._keepers[name].has_read(generation)
            if self._serves(name) and (everything or self._keep(name).reached != generation):
                self._keep(name).look()
        for name, keeper in self._keepers.items():
            if name not in generations:
                keeper.nothing_to_serve("no such model is registered yet")

    def _serves(self, model_name: str) -> bool:
        return self._models is None or model_name in self._models

    def _is_time_to_resync(self) -> bool:
        """Whether to look at every model: a registry that was replaced can have the same generations by chance."""
        now = self._loop.time()
        if now - self._resynced_at < _RESYNC_S:
            return False
        self._resynced_at = now
        return True

    async def _snapshots_of(self, error: ModelServeError) -> dict[str, Snapshot]:
        """Return what can stand in for a registry that does not answer; nothing can for one that refuses."""
        if self._snapshots is None or not isinstance(error, BackendUnavailable):
            return {}
        return await self._loop.run_in_executor(self._executor, self._snapshots.load)

    def _lost(self, problem: str, stand_in: Mapping[str, Snapshot] | None = None) -> None:
        if self._problem is None:
            _log.error("%s; what is loaded keeps serving", problem)
            self._lost_since = self._now()
        self._problem = problem
        for name, snapshot in (stand_in or {}).items():
            if self._serves(name):
                self._keep(name).stand_in(snapshot)
        for keeper in self._keepers.values():
            keeper.nothing_to_serve(problem)

    def _keep(self, model_name: str) -> Keeper:
        keeper = self._keepers.get(model_name)
        if keeper is None:
            options = (self._models or {}).get(model_name) or ModelOptions()
            keeper = Keeper(
                model_name,
                options,
                registry=self._registry,
                loader=self._loader,
                executor=self._executor,
                observers=self._observers,
                snapshots=self._snapshots,
            )
            self._keepers[model_name] = keeper
        return keeper
