"""One version into service: room, fetch, verify, load, warm up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from modelserve import signing
from modelserve.artifacts import ArtifactStore, DiskCache, Lease
from modelserve.config import ModelOptions
from modelserve.contents import contents
from modelserve.errors import TooLittleMemory
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
from modelserve.types import Artifact, Json, ModelVersion, Role

T = TypeVar("T")
_log = logging.getLogger("modelserve")


class LoadThreads(NamedTuple):
    """The threads for the blocking work of loads: downloads, and the hashing of what the start of a replica reads.

    The latter has its own, so that a restart does not wait for downloads.
    """

    loads: Executor
    starts: Executor


class Loader:
    """Takes versions into service, with blocking work (downloads, hashing) on ``executor``.

    What a replica's start reads is hashed on ``starts``, so that a restart does not wait for the downloads of others.
    ``lesser`` are the threads for canaries and shadows: where a role has its own, production never waits for its loads.
    ``observers`` are notified of what happens to the pools. ``memory`` says whether there is room for another version.
    With ``trusted_keys``, a version is signed by one of them unless its model's options waive that.
    """

    def __init__(
        self,
        store: ArtifactStore,
        cache: DiskCache,
        executor: Executor,
        observers: Observers | None = None,
        *,
        starts: Executor | None = None,
        lesser: Mapping[Role, LoadThreads] | None = None,
        memory: Memory | None = None,
        trusted_keys: Sequence[TrustedKey] = (),
    ) -> None:
        self._observers = Observers() if observers is None else observers
        self._memory = Memory() if memory is None else memory
        self._store = store
        self._cache = cache
        self._threads = LoadThreads(executor, starts or executor)
        self._lesser = lesser or {}
        self._trusted_keys = tuple(trusted_keys)

    async def load(
        self,
        meta: ModelVersion,
        options: ModelOptions,
        *,
        role: Role = "production",
        niceness: int = 0,
        beside: LoadedVersion | None = None,
        rivals: Sequence[ModelVersion] = (),
    ) -> LoadedVersion:
        """Return the version, warm and proven to answer as it did at registration.

        ``niceness`` lowers the priority of its worker processes, for versions that only shadow another. ``beside`` is
        the version that serves meanwhile. ``options.reload`` says whether a version for production is loaded in full
        beside it, if there is memory for that, or takes the room of one of its replicas and has one itself until it is
        gone. For any other role it is loaded in full. ``rivals`` are versions of the model whose memory is still to
        be counted: they matter more, or are being loaded.

        Raises ``LoadError`` (or ``BackendUnavailable`` when the artifact cannot be had now); nothing stays behind then.
        It is ``TooLittleMemory`` where memory is short.
        """
        threads = self._lesser.get(role, self._threads)
        self._verify(meta, options)
        signature = Signature.from_json(meta.signature)
        plan = plan_of(meta.model_name, signature, options.declared_features)
        before = beside if role == "production" and options.reload == "replace" else None
        if before is None and (beside is not None or role != "production"):
            await self._require_memory(threads, meta, options, beside, rivals)
        with contextlib.ExitStack() as leases:
            lease = await self._fetch(meta.artifact, threads.loads)
            provision = Provision(meta.artifact, lease, partial(self._fetch, meta.artifact, threads.starts))
            leases.callback(provision.close)
            example = None
            if meta.example is not None:  # held as long as the model: a start without the registry needs it
                held = leases.enter_context(await self._fetch(meta.example, threads.loads))
                example = await _run(threads, _read_json, held.path, meta.example)
            pool = pool_for(meta, options, signature, provision, niceness=niceness, emit=self._observers.emit)
            hand_over = HandOver(pool, before.hand_over if before is not None else None)
            try:
                warm_up = WarmUp(signature, example, largest_batch=options.batch_rows, padded=options.pad_batches)
                await hand_over.start(warm_up)
                warnings = await self._misfits(threads, meta, options, signature.strings, pool)
            except BaseException:
                await asyncio.shield(_discard(hand_over, leases.pop_all()))
                raise
            kept = leases.pop_all()
            return LoadedVersion(meta, options, signature, hand_over, kept, plan=plan, warnings=warnings)

    async def _misfits(
        self, threads: LoadThreads, meta: ModelVersion, options: ModelOptions, strings: int, pool: Pool
    ) -> tuple[str, ...]:
        """Say in the log what of the options cannot work with this model on this machine."""
        _, taken = await _run(threads, self._look_at_memory, _pids(pool))
        each, total = max(meta.artifact.size, taken or 0), await _run(threads, self._memory.total)
        found = misfits(options, pool.measured, strings=strings, replica_bytes=each, memory_bytes=total)
        for sentence in found:
            _log.warning("misconfigured: %s %s: %s", meta.model_name, meta.version, sentence)
        return found

    async def _require_memory(
        self,
        threads: LoadThreads,
        meta: ModelVersion,
        options: ModelOptions,
        beside: LoadedVersion | None,
        rivals: Sequence[ModelVersion],
    ) -> None:
        """Refuse a version that would have the process, or its neighbours, killed for memory."""
        pids, known = ([], 0) if beside is None else (_pids(beside.pool), beside.meta.artifact.size)
        free, taken = await _run(threads, self._look_at_memory, pids)
        each, *others = [needed(size=one.artifact.size, before=known, taken=taken) for one in (meta, *rivals)]
        replicas = options.replica_range[0]
        if free is not None and replicas * (each + sum(others)) > free:
            raise TooLittleMemory(_shortage(replicas, each, free, replicas * sum(others), beside))

    def _look_at_memory(self, pids: Sequence[int]) -> tuple[int | None, int | None]:
        """Return what is available, and the most that one of the processes takes."""
        taken = [self._memory.taken_by(pid) for pid in pids]
        return self._memory.available(), max((each for each in taken if each is not None), default=None)

    def _verify(self, meta: ModelVersion, options: ModelOptions) -> None:
        """Refuse a row that no trusted key has signed before any of it is believed; what it says pins the rest."""
        required = options.require_signature
        if bool(self._trusted_keys) if required is None else required:
            signing.verify(self._trusted_keys, meta)

    async def _fetch(self, artifact: Artifact, executor: Executor) -> Lease:
        given_up = threading.Event()
        fetch = partial(self._cache.fetch, self._store, artifact, given_up)
        fetching = asyncio.get_running_loop().run_in_executor(executor, fetch)
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:
            # The thread stops at the next piece, or comes back with a lease that is not wanted any more.
            given_up.set()
            fetching.add_done_callback(_release)
            raise


async def _run(threads: LoadThreads, call: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads.loads, call, *args)


def _pids(pool: Pool) -> list[int]:
    pids = [each.detail.get("pid") for each in pool.status().replicas]
    return [pid for pid in pids if pid is not None]


def _read_json(path: Path, artifact: Artifact) -> Json:
    return orjson.loads(contents(path, artifact.sha256))


def _release(fetching: asyncio.Future[Lease]) -> None:
    if not fetching.cancelled() and fetching.exception() is None:
        fetching.result().release()


def _shortage(replicas: int, each: int, free: int, kept: int, beside: LoadedVersion | None) -> str:
    company = "" if beside is None else f" beside {beside.meta.version}"
    spoken_for = f", of which {_megabytes(kept)} are for versions that are still to be loaded" if kept else ""
    return (
        f"there is too little memory to load it{company}: {replicas} x {_megabytes(each)} would be needed, "
        f"{_megabytes(free)} are available{spoken_for}; give the server more memory, or set "
        'reload="replace" to have the replicas in production replaced one after the other'
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


async def _discard(hand_over: HandOver, leases: contextlib.ExitStack) -> None:
    await hand_over.stop()
    leases.close()
