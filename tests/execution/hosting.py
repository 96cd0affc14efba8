"""How the tests of this folder make replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelserve.execution.process import ProcessReplica, WorkerSpec
from modelserve.execution.thread import ThreadReplica
from modelserve.ports import Framework
from modelserve.signature import Signature
from modelserve.types import Runtime
from tests.execution.faulty import FaultyFramework


def thread_replica(
    model: str, signature: Signature, *, framework: type[Framework] = FaultyFramework, **options: Any
) -> ThreadReplica:
    """Return a replica in a thread, not started."""
    return ThreadReplica(lambda: framework().load(Path(), model, options), signature)


def process_replica(
    model: str,
    signature: Signature,
    *,
    framework: type[Framework] = FaultyFramework,
    niceness: int = 0,
    **options: Any,
) -> ProcessReplica:
    """Return a replica in a process, not started."""
    spec = WorkerSpec(
        framework=f"{framework.__module__}:{framework.__name__}",
        path="",
        format=model,
        load_options=options,
        signature=signature.to_json(),
        runtime=Runtime(threads=3),
        niceness=niceness,
    )
    return ProcessReplica(spec, signature)
