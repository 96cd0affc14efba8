"""One version into service: room, fetch, verify, load, warm up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from modelserve import signing
from modelserve.artifacts import ArtifactStore, DiskCache, Lease
from modelserve.config import ModelOptions
from modelserve.contents import contents
from modelserve.errors import LoadFailed
from modelserve.events import Observers
from modelserve.execution.pool import Pool
from modelserve.features.plan import plan_of
from modelserve.ports import TrustedKey
from modelserve.serving.feasibility import misfits
from modelserve.serving.hand_over import HandOver
from modelserve.serving.host_memory import Memory, needed
from modelserve.serving.provision import Provision
from modelserve.serving.replicas import pool_for
from modelserve.serving.version import LoadedVersion
from modelserve.serving.warmup import WarmUp
from modelserve.signature import Signature
from modelserve.types import Artifact, Json, ModelVersion

_log = logging.getLogger("modelserve")


class Loader:
    """Takes versions into service, with blocking work (downloads, hashing) on ``executor``.

    What a replica's start reads is hashed on ``starts``, so that a restart does not wait for the downloads of others.
    ``observers`` are told what happens to their pools. ``memory`` tells whether there is room for another version. With
    ``trusted_keys``, a version is signed by one of them unless its model's options waive that.
    """

    def __init__(
        self,
        store: ArtifactStore,
        cache: DiskCache,
        executor: Executor,
        observers: Observers | None = None,
        *,
        starts: Executor | None = None,
        memory: Memory | None = None,
        trusted_keys: Sequence[TrustedKey] = (),
    ) -> None:
        self._observers = Observers() if observers is None else observers
        self._memory = Memory() if memory is None else memory
        self._store = store
        self._cache = cache
        self._executor = executor
        self._starts = starts or executor
        self._trusted_keys = tuple(trusted_keys)

    async def load(
        self, meta: ModelVersion, options: ModelOptions, *, niceness: int = 0, beside: LoadedVersion | None = None
    ) -> LoadedVersion:
        """Return the version, warm and proven to answer as it did at registration.

        ``niceness`` lowers the priority of its worker processes, for versions that only shadow another. ``beside`` is
        the version that serves meanwhile. ``options.reload`` says whether the new one is loaded in full beside it, if
        there is memory for that, or takes the room of one of its replicas and has one itself until it is gone.

        Raises ``LoadError`` (or ``BackendUnavailable`` when the artifact cannot be had now); nothing stays behind then.
        """
        self._verify(meta, options)
        signature = Signature.from_json(meta.signature)
        plan = plan_of(meta.model_name, signature, options.declared_features)
        before = beside if options.reload == "replace" else None
        if beside is not None and before is None:
            await self._require_memory(meta, options, beside)
        with contextlib.ExitStack() as leases:
            lease = await self._fetch(meta.artifact)
            provision = Provision(meta.artifact, lease, partial(self._fetch, meta.artifact, self._starts))
            leases.callback(provision.close)
            example = None
            if meta.example is not None:  # held as long as the model: a start without the registry needs it
                held = leases.enter_context(await self._fetch(meta.example))
                example = await self._run(_read_json, held.path, meta.example)
            pool = pool_for(meta, options, signature, provision, niceness=niceness, tell=self._observers.emit)
            hand_over = HandOver(pool, before.hand_over if before is not None else None)
            try:
                warm_up = WarmUp(signature, example, largest_batch=options.batch_rows, padded=options.pad_batches)
                await hand_over.start(warm_up)
                warnings = await self._misfits(meta, options, signature.strings, pool)
            except BaseException:
                await asyncio.shield(_discard(hand_over, leases.pop_all()))
                raise
            kept = leases.pop_all()
            return LoadedVersion(meta, options, signature, hand_over, kept, plan=plan, warnings=warnings)

    async def _misfits(self, meta: ModelVersion, options: ModelOptions, strings: int, pool: Pool) -> tuple[str, ...]:
        """Say in the log what of the options cannot work with this model on this machine."""
        _, taken = await self._run(self._look_at_memory, _pids(pool))
        each, total = max(meta.artifact.size, taken or 0), await self._run(self._memory.total)
        found = misfits(options, pool.measured, strings=strings, replica_bytes=each, memory_bytes=total)
        for sentence in found:
            _log.warning("misconfigured: %s %s: %s", meta.model_name, meta.version, sentence)
        return found

    async def _require_memory(self, meta: ModelVersion, options: ModelOptions, beside: LoadedVersion) -> None:
        """Refuse a version that would have the process, or its neighbours, killed for memory."""
        free, taken = await self._run(self._look_at_memory, _pids(beside.pool))
        each = needed(size=meta.artifact.size, before=beside.meta.artifact.size, taken=taken)
        replicas = options.replica_range[0]
        if free is not None and replicas * each > free:
            raise LoadFailed(
                f"there is too little memory to load it beside {beside.meta.version}: {replicas} x {_megabytes(each)} "
                f"would be needed, {_megabytes(free)} are available; give the server more memory, or set "
                'reload="replace" to have replicas replaced one after the other'
            )

    def _look_at_memory(self, pids: Sequence[int]) -> tuple[int | None, int | None]:
        """Return what is available, and the most that one of the processes takes."""
        taken = [self._memory.taken_by(pid) for pid in pids]
        return self._memory.available(), max((each for each in taken if each is not None), default=None)

    def _verify(self, meta: ModelVersion, options: ModelOptions) -> None:
        """Refuse a row that nobody trusted signed before any of it is believed; the rest is pinned by what it says."""
        required = options.require_signature
        if bool(self._trusted_keys) if required is None else required:
            signing.verify(self._trusted_keys, meta)

    async def _fetch(self, artifact: Artifact, executor: Executor | None = None) -> Lease:
        given_up = threading.Event()
        fetch = partial(self._cache.fetch, self._store, artifact, given_up)
        fetching = asyncio.get_running_loop().run_in_executor(executor or self._executor, fetch)
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:
            # The thread stops at the next piece, or comes back with a lease that nobody waits for.
            given_up.set()
            fetching.add_done_callback(_release)
            raise

    async def _run(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)


def _pids(pool: Pool) -> list[int]:
    pids = [each.detail.get("pid") for each in pool.status().replicas]
    return [pid for pid in pids if pid is not None]


def _read_json(path: Path, artifact: Artifact) -> Json:
    return orjson.loads(contents(path, artifact.sha256))


def _release(fetching: asyncio.Future[Lease]) -> None:
    if not fetching.cancelled() and fetching.exception() is None:
        fetching.result().release()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


async def _discard(hand_over: HandOver, leases: contextlib.ExitStack) -> None:
    await hand_over.stop()
    leases.close()
