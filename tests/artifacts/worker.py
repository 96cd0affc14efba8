"""What other processes do to a cache in the tests: ``worker TASK STORE FOLDER KEY SIZE [ARGUMENTS]``."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path

from modelserve.artifacts import ArtifactStore, DiskCache, fetching
from modelserve.artifacts.transfer import DownloadBudget
from modelserve.types import Artifact
from tests.artifacts.stores import WaitingStore


class ReportingStore(ArtifactStore):
    """In the middle of a download, tells a pipe who is there and waits for a line."""

    def read(self, key: str, effort: DownloadBudget | None = None) -> Generator[bytes, None, None]:
        data = b"".join(super().read(key, effort))
        yield data[: len(data) // 2]
        os.write(int(sys.argv[6]), f"{os.getpid()}\n".encode())
        sys.stdin.readline()
        yield data[len(data) // 2 :]


def download(root: str, folder: Path, artifact: Artifact) -> None:
    """Fetch; say the digest of what came."""
    if sys.argv[7] == "without locks":
        fcntl.flock = lambda *_: None
    with DiskCache(folder).fetch(ReportingStore(root), artifact) as lease:
        print(hashlib.sha256(lease.path.read_bytes()).hexdigest())


def cold_start(root: str, folder: Path, artifact: Artifact) -> None:
    """Fetch from S3 when a line comes; say the digest of what came."""
    if sys.argv[7] == "without locks":
        fcntl.flock = lambda *_: None
    store = ArtifactStore(root, **json.loads(sys.argv[6]))
    store.ping()  # to be connected: what is compared are downloads, not imports
    print("ready", flush=True)
    sys.stdin.readline()
    with DiskCache(folder).fetch(store, artifact) as lease:
        print(hashlib.sha256(lease.path.read_bytes()).hexdigest(), flush=True)


def lease(root: str, folder: Path, artifact: Artifact) -> None:
    """Lease until a line comes; say what then is at the path."""
    with DiskCache(folder).fetch(ArtifactStore(root), artifact) as lease:
        print("leased", flush=True)
        sys.stdin.readline()
        print(sorted(path.name for path in lease.path.rglob("*")) if lease.path.is_dir() else lease.path.read_text())


def fork(root: str, folder: Path, artifact: Artifact) -> None:
    """Fork while a thread downloads; the child fetches the same artifact from a store that answers."""
    fetching.PATIENCE_S = 0.1  # type: ignore[misc]
    cache, waiting = DiskCache(folder), WaitingStore(root)
    held = cache.fetch(ArtifactStore(root), Artifact(key=sys.argv[6], sha256=sys.argv[6][-64:], size=99, format="raw"))
    thread = threading.Thread(target=lambda: cache.fetch(waiting, artifact).release())
    thread.start()
    waiting.is_half_way.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            held.release()
            with cache.fetch(ArtifactStore(root), artifact) as lease:
                status = int(lease.path.stat().st_size != artifact.size)
        finally:
            os._exit(status)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    waiting.may_go_on.set()
    thread.join()
    held.release()


if __name__ == "__main__":
    task, root, folder, key, size = sys.argv[1:6]
    artifact = Artifact(key=key, sha256=key[-64:], size=int(size), format="raw")
    {"download": download, "cold-start": cold_start, "lease": lease, "fork": fork}[task](root, Path(folder), artifact)
