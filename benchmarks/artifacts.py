"""From the store to the disk and back into use: a download, a warm start, a restart's checks, beside the bare tools."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import boto3
import s3fs

from benchmarks._common import Budget, alternate, arguments, machine, median, print_table, ratio, report
from modelserve.artifacts import ArtifactStore, DiskCache, Lease
from modelserve.contents import contents
from modelserve.serving.provision import Provision
from modelserve.types import Artifact
from tests import servers

_MB: Final = 1_000_000
_PIECE: Final = 1024 * 1024


def main() -> None:
    """Measure, print, write."""
    quick = arguments(__doc__).parse_args().quick
    size, rounds = (20 * _MB, 2) if quick else (200 * _MB, 5)
    print(machine())
    with tempfile.TemporaryDirectory() as name, _s3_in_a_process() as endpoint:
        folder = Path(name)
        remote = servers.create_bucket(endpoint)
        store = ArtifactStore(remote.url, **remote.storage_options)
        local = ArtifactStore(folder / "store")
        source = folder / "model"
        _write(source, size)
        artifact = store.put(source, format="raw")
        local.put(source, format="raw")
        sides = _sides(folder, source=source, store=store, local=local, remote=remote, artifact=artifact)
        for side in sides.values():  # connections, and pages of the source in memory
            side()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            grown = pool.apply(_memory_of_a_download, (remote, artifact, folder / "memory"))
        found = alternate(sides, rounds)
        store.close()
    rows = [_row(side, seconds, found, size) for side, seconds in found.items()]
    print_table(f"{size // _MB} MB, medians of {rounds} rounds", rows)
    print(f"\npeak memory grew by {grown:.0f} MB in a cold download")
    report(
        "artifacts", quick=quick, rows=[*rows, {"side": "memory", "grown_mb": grown}], budgets=_budgets(found, grown)
    )


def _sides(
    folder: Path,
    *,
    source: Path,
    store: ArtifactStore,
    local: ArtifactStore,
    remote: servers.S3Artifacts,
    artifact: Artifact,
) -> dict[str, Callable[[], float]]:
    path = f"{remote.url.removeprefix('s3://')}/{artifact.key}"
    bucket, _, key = path.partition("/")
    location = remote.storage_options["client_kwargs"]
    client = boto3.client("s3", aws_access_key_id="test", aws_secret_access_key="test", **location)  # noqa: S106  # of a server that lives for one run
    driver = s3fs.S3FileSystem(**remote.storage_options)
    target = folder / "copy"
    warm = folder / "warm"
    return {
        "cold from S3": partial(_cold, folder, store, artifact),
        "boto3 get_object": partial(_timed, lambda: _save(client.get_object(Bucket=bucket, Key=key)["Body"], target)),
        "s3fs get_file": partial(_timed, lambda: driver.get_file(path, str(target))),
        "cold from a folder": partial(_cold, folder, local, artifact),
        "shutil.copy": partial(_timed, lambda: shutil.copy(source, target)),
        "warm start": partial(_timed, lambda: DiskCache(warm).fetch(local, artifact).release()),
        "checks of a restart": partial(_restart, DiskCache(warm), local, artifact),
        "bare SHA-256": partial(_timed, lambda: _hash(source)),
    }


def _cold(folder: Path, store: ArtifactStore, artifact: Artifact) -> float:
    """Fetch into a cache that is empty, which is emptied again off the clock."""
    cache = folder / "cold"
    try:
        return _timed(lambda: DiskCache(cache).fetch(store, artifact).release())
    finally:
        shutil.rmtree(cache)


def _restart(cache: DiskCache, store: ArtifactStore, artifact: Artifact) -> float:
    """Do all that a replica's start does for the sake of its bytes, where a file is read whole, without the load."""

    async def fetch() -> Lease:
        return await asyncio.to_thread(cache.fetch, store, artifact)

    async def start() -> float:
        provision = Provision(artifact, await fetch(), fetch)
        began = time.perf_counter()
        async with provision.intact():
            await asyncio.to_thread(contents, provision.path, artifact.sha256)
        provision.close()
        return time.perf_counter() - began

    return asyncio.run(start())


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _save(body: Any, target: Path) -> None:
    with target.open("wb") as file:
        for piece in body.iter_chunks(_PIECE):
            file.write(piece)


def _hash(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // _MB):
            file.write(os.urandom(_MB))


def _memory_of_a_download(remote: servers.S3Artifacts, artifact: Artifact, folder: Path) -> float:
    """Return by how many MB the peak of a process of its own grows, after a small download has loaded the driver."""
    store, cache = ArtifactStore(remote.url, **remote.storage_options), DiskCache(folder)
    cache.fetch(store, store.put_bytes(b"x" * _MB, format="raw")).release()
    before = _peak_mb()
    cache.fetch(store, artifact).release()
    store.close()
    return _peak_mb() - before


def _peak_mb() -> float:
    """Return the peak of this program. Linux's ``ru_maxrss`` is also that of whoever started it."""
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_048_576


def _row(side: str, seconds: list[float], found: Mapping[str, list[float]], size: int) -> dict[str, Any]:
    return {
        "side": side,
        "seconds": median(seconds),
        "MB/s": size / _MB / median(seconds),
        "/ boto3": ratio(seconds, found["boto3 get_object"]),
        "/ copy": ratio(seconds, found["shutil.copy"]),
        "/ hash": ratio(seconds, found["bare SHA-256"]),
    }


def _budgets(found: Mapping[str, list[float]], grown: float) -> list[Budget]:
    return [
        Budget("warm start / bare SHA-256", 1.2, ratio(found["warm start"], found["bare SHA-256"]), at_least=False),
        Budget(
            "checks of a restart / bare SHA-256",
            4.0,
            ratio(found["checks of a restart"], found["bare SHA-256"]),
            at_least=False,
        ),
        Budget("MB of memory that a cold download takes", 32.0, grown, at_least=False),
    ]


# -- the server, in a process of its own: in this one its memory and its time would count -------------------


@contextlib.contextmanager
def _s3_in_a_process() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def _serve(connection: Connection) -> None:
    with servers.s3() as endpoint:
        connection.send(endpoint)
        connection.recv()


if __name__ == "__main__":
    main()
