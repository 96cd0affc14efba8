"""One version into service: fetch, verify, load, warm up, reproduce the golden example. And out again: drain, free."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import orjson

from modelserve import plugins, signing
from modelserve.agreement import agrees
from modelserve.artifacts import ArtifactStore, DiskCache, Lease
from modelserve.config import ModelOptions
from modelserve.contents import contents
from modelserve.errors import InferenceFailed, LoadFailed
from modelserve.events import Event, Observers
from modelserve.execution.cores import share_of
from modelserve.execution.padding import Padded
from modelserve.execution.pool import Pool, PoolOptions
from modelserve.execution.process import ProcessReplica, WorkerSpec
from modelserve.execution.seat import Infer
from modelserve.execution.thread import ThreadReplica
from modelserve.feasibility import misfits
from modelserve.features.plan import FeaturePlan, Pending, plan_of
from modelserve.memory import Memory, needed
from modelserve.ports import Model, Replica, TrustedKey
from modelserve.provision import Provision
from modelserve.signature import Signature
from modelserve.signature.digest import input_digest
from modelserve.types import Artifact, Json, ModelVersion, Row, Runtime

_log = logging.getLogger("modelserve")
_WARM_UP_LIMIT_S: Final = 60.0
_SLOW_BATCH_S: Final = 0.25  # larger buckets of a model this slow would delay the swap more than they warm
_WARM_UP_RUNS: Final = 3
_QUICK_S: Final = 0.01


class LoadedVersion:
    """A version that can answer: its signature, its pool, and a count of the requests on it.

    A request holds a lease from choosing the version to its answer; :meth:`unload` waits for the last of them.

    One that was loaded in the room of ``before`` grows to its full number of replicas when that is gone. If it goes
    first, because another is wanted by now, ``before`` has its room back.
    """

    __slots__ = (
        "_before",
        "_digest",
        "_drained",
        "_gone",
        "_growing",
        "_held",
        "_leases",
        "_room",
        "cache_ttl_s",
        "meta",
        "options",
        "plan",
        "pool",
        "request_key",
        "signature",
        "timeout_s",
        "warnings",
    )

    def __init__(
        self,
        meta: ModelVersion,
        options: ModelOptions,
        signature: Signature,
        pool: Pool,
        held: contextlib.ExitStack,
        *,
        before: LoadedVersion | None = None,
        plan: FeaturePlan | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.meta = meta
        self.options = options
        self.signature = signature
        self.plan = plan
        self.pool = pool
        self.timeout_s = options.timeout_ms / 1000
        self.warnings = tuple(warnings)
        """What of its options cannot work."""
        self.cache_ttl_s = options.cache_ttl_s
        self._digest = input_digest(meta, signature.canonical)
        self.request_key = None if plan is None or options.cache_key == "merged" else _request_key(meta, plan)
        """Returns the key of what is answered to a request whatever its features are; None where these count."""
        self._held = held  # what has to stay on the disk
        self._leases = 0
        self._drained: asyncio.Event | None = None
        self._gone = asyncio.Event()
        self._room = asyncio.Lock()
        self._before = before
        self._growing: asyncio.Task[None] | None = None
        if before is not None:
            self._growing = asyncio.create_task(self._grow_after(before), name="modelserve-grow")

    def cache_key(self, row: Row) -> str:
        """Return the key of what this version answers to a row: the model's name and the digest of the input."""
        return f"{self.meta.model_name}:{self._digest(row).hex()}"

    def __enter__(self) -> Self:
        self._leases += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._leases -= 1
        if self._leases == 0 and self._drained is not None:
            self._drained.set()

    async def unload(self) -> None:
        """Wait until no request is on this version, then free it."""
        if self._leases:
            self._drained = asyncio.Event()
            await self._drained.wait()
        if self._growing is not None:
            self._growing.cancel()
            await asyncio.wait([self._growing])
        try:
            await self.pool.stop()
        finally:
            self._held.close()
            self._gone.set()
            if self._before is not None:
                self._before.take_room_back()

    def abandon(self) -> None:
        """Free it without the loop, which has ended, and with it every request."""
        self.pool.abandon()
        self._held.close()

    async def make_room(self) -> None:
        """Give up one replica, if there is more than one, for a version that is to take over.

        Only one can have the room at a time: the next waits until it was taken back, so that there are never more
        replicas than the options say.
        """
        await self._room.acquire()
        try:
            if self._growing is not None:
                await asyncio.wait([self._growing])
            if self.pool.size > 1:
                await self.pool.confine(self.pool.size - 1)
        except BaseException:
            self.take_room_back()
            raise

    def take_room_back(self) -> None:
        """Grow to the full number of replicas again: the version that had the room is gone."""
        self._room.release()
        if not self._gone.is_set():
            self.pool.release()

    async def _grow_after(self, before: LoadedVersion) -> None:
        await before._gone.wait()
        self._before = None
        self.pool.release()


def _request_key(meta: ModelVersion, plan: FeaturePlan) -> Callable[[Pending], str]:
    digest = input_digest(meta, plan.canonical)
    return lambda pending: f"{meta.model_name}:request:{digest(pending).hex()}"


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
            pool = _pool_for(meta, options, signature, provision, niceness=niceness, tell=self._observers.emit)
            try:
                proof = Proof(signature, example, largest_batch=options.batch_rows, padded=options.pad_batches)
                await _start(pool, proof, before)
                warnings = await self._misfits(meta, options, pool)
            except BaseException:
                await asyncio.shield(_discard(pool, leases.pop_all()))
                raise
            kept = leases.pop_all()
            return LoadedVersion(meta, options, signature, pool, kept, before=before, plan=plan, warnings=warnings)

    async def _misfits(self, meta: ModelVersion, options: ModelOptions, pool: Pool) -> tuple[str, ...]:
        """Say in the log what of the options cannot work with this model on this machine."""
        _, taken = await self._run(self._look_at_memory, _pids(pool))
        each, total = max(meta.artifact.size, taken or 0), await self._run(self._memory.total)
        found = misfits(options, pool.measured, replica_bytes=each, memory_bytes=total)
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


def _pool_for(
    meta: ModelVersion,
    options: ModelOptions,
    signature: Signature,
    provision: Provision,
    *,
    niceness: int,
    tell: Callable[[Event], None],
) -> Pool:
    make_replica = _thread_replica
    if options.executor == "process":
        make_replica = partial(_process_replica, niceness=niceness)
    smallest, largest = options.replica_range
    pool_options = PoolOptions(
        smallest=smallest,
        largest=largest,
        max_rows=options.batch_rows,
        adaptive=options.max_batch_size == "auto",
        queue_limit=options.queue_limit,
        max_wait_s=options.max_wait_ms / 1000,
        slo_s=options.slo_ms / 1000,
        start_limit_s=options.start_limit_s,
        hang_limit_s=options.hang_limit_s,
        scaling=options.scaling,
    )
    return Pool(
        partial(make_replica, meta, options, signature, provision.path),
        pool_options,
        fingerprint=input_digest(meta, signature.canonical),
        model_name=meta.model_name,
        version=meta.version,
        tell=tell,
        intact=provision.intact,
    )


def _thread_replica(meta: ModelVersion, options: ModelOptions, signature: Signature, path: Path, place: int) -> Replica:
    def load() -> Model:
        framework = plugins.framework(meta.framework)
        model = framework.load(path, meta.artifact.format, meta.load_options, _runtime(meta, options, place))
        return Padded(model, options.batch_rows) if options.pad_batches else model

    return ThreadReplica(load, signature, name=f"modelserve-{meta.model_name}-{meta.version}")


def _process_replica(
    meta: ModelVersion, options: ModelOptions, signature: Signature, path: Path, place: int, *, niceness: int
) -> Replica:
    spec = WorkerSpec(
        framework=plugins.framework_path(meta.framework),
        path=str(path),
        format=meta.artifact.format,
        load_options=meta.load_options,
        signature=signature.to_json(),
        runtime=_runtime(meta, options, place),
        pad_to=options.batch_rows if options.pad_batches else None,
        niceness=niceness,
    )
    return ProcessReplica(spec, signature, name=f"modelserve-{meta.model_name}-{meta.version}")


def _runtime(meta: ModelVersion, options: ModelOptions, place: int) -> Runtime:
    return Runtime(
        sha256=meta.artifact.sha256,
        allow_pickle=options.allow_pickle,
        allow_code=options.allow_code,
        factories=options.factories,
        device=options.device_of(place),
        threads=options.threads or share_of(options.replica_range[1]),
        compile=options.compile,
    )


def _read_json(path: Path, artifact: Artifact) -> Json:
    return orjson.loads(contents(path, artifact.sha256))


def _release(fetching: asyncio.Future[Lease]) -> None:
    if not fetching.cancelled() and fetching.exception() is None:
        fetching.result().release()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


async def _start(pool: Pool, proof: Proof, before: LoadedVersion | None) -> None:
    """Start the pool in full, or with one replica in the room of the version before."""
    if before is None:
        await pool.start(proof)
        return
    await before.make_room()
    try:
        await pool.start(proof, replicas=1)
    except BaseException:
        await asyncio.shield(pool.stop())
        before.take_room_back()
        raise


async def _discard(pool: Pool, leases: contextlib.ExitStack) -> None:
    await pool.stop()
    leases.close()


# -- warm-up and golden example ----------------------------------------------------------------------------


class Proof:
    """Shows of one replica that it answers: every batch size once, and the golden example as it did at registration.

    ``example`` is the registered document ``{"inputs": [row, …], "outputs": [answer, …] | None}``; without one
    there is nothing to run.
    """

    def __init__(self, signature: Signature, example: Json, *, largest_batch: int, padded: bool = False) -> None:
        self._rows = [] if example is None else [signature.validate(record) for record in example["inputs"]]
        self._expected = None if example is None else example["outputs"]
        self._largest_batch = largest_batch
        self._padded = padded

    async def __call__(self, infer: Infer) -> None:
        """Raise ``LoadFailed`` unless the replica behind ``infer`` answers."""
        if not self._rows:
            return
        try:
            async with asyncio.timeout(_WARM_UP_LIMIT_S):
                await self._warm_up(infer)
                if self._expected is not None:
                    _compare(self._expected, await infer(self._rows))
        except TimeoutError as error:
            raise LoadFailed(f"the warm-up did not end within {_WARM_UP_LIMIT_S:.0f} s") from error
        except InferenceFailed as error:
            raise LoadFailed(f"the warm-up failed: {error}") from error

    async def _warm_up(self, infer: Infer) -> None:
        """Run every batch size that is a power of two, so that no request pays for a first time.

        Each is run a few times if that is quick: the first run of a size, which may have to prepare the model for it,
        tells little about what the next will cost. The sizes that batches are padded to are run however slow they are.
        """
        now = asyncio.get_running_loop().time
        for size in self._sizes():
            rows = [self._rows[i % len(self._rows)] for i in range(size)]
            await infer(rows)
            started, runs = now(), 1
            while runs == 1 or (runs < _WARM_UP_RUNS and now() - started < _QUICK_S):
                await infer(rows)
                runs += 1
            if not self._padded and now() - started > _SLOW_BATCH_S:
                return

    def _sizes(self) -> list[int]:
        powers = [1 << i for i in range(self._largest_batch.bit_length())]
        return sorted({*powers, self._largest_batch}) if self._padded else powers


def _compare(expected: list[Json], answers: list[Json]) -> None:
    """Refuse a version that does not answer its golden example as it did at registration."""
    try:
        found = orjson.loads(orjson.dumps(answers, option=orjson.OPT_SERIALIZE_NUMPY))
    except TypeError as error:
        raise LoadFailed(f"the model's answer to the golden example has no JSON form: {error}") from error
    for i, (wanted, given) in enumerate(zip(expected, found, strict=True)):
        if not agrees(wanted, given):
            raise LoadFailed(f"golden example, row {i}: registered answer {_short(wanted)}, got {_short(given)}")


def _short(value: Json) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."  # noqa: PLR2004
