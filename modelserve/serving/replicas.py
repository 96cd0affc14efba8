"""From the options of a model to the pool that runs it, and the replicas in that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from modelserve import plugins
from modelserve.config import ModelOptions
from modelserve.events import Event
from modelserve.execution.cores import share_of
from modelserve.execution.padding import Padded
from modelserve.execution.pool import Pool, PoolOptions
from modelserve.execution.process import ProcessReplica, WorkerSpec
from modelserve.execution.thread import ThreadReplica
from modelserve.ports import Model, Replica
from modelserve.serving.provision import Provision
from modelserve.signature import Signature
from modelserve.signature.digest import input_digest
from modelserve.types import ModelVersion, Runtime


def pool_for(
    meta: ModelVersion,
    options: ModelOptions,
    signature: Signature,
    provision: Provision,
    *,
    niceness: int,
    emit: Callable[[Event], None],
) -> Pool:
    """Return the pool that runs a version as its options say; nothing is started yet."""
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
        tell=emit,
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
