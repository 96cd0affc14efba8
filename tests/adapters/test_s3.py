"""S3 behind a proxy that misbehaves: what is tried again, how often, and that no wrong byte gets through."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from modelserve.artifacts import ArtifactStore, DiskCache
from modelserve.artifacts.fetching import Fetching
from modelserve.artifacts.layout import FileId
from modelserve.errors import ArtifactCorrupt, BackendUnavailable, LoadFailed, ModelServeError
from modelserve.types import Artifact
from tests.faulty_s3 import FOREVER, FaultyS3

pytestmark = pytest.mark.aws
SIZE = 6_000_000
HALF = 3_500_000


@pytest.fixture
def store(faulty_s3: FaultyS3) -> Iterator[ArtifactStore]:
    """The store as it is reached through the proxy."""
    store = ArtifactStore(faulty_s3.artifacts.url, **faulty_s3.artifacts.storage_options)
    yield store
    store.close()


@pytest.fixture
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def artifact(store: ArtifactStore, data: bytes) -> Artifact:
    return store.put_bytes(data, format="raw")


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache")


def fetched(cache: DiskCache, store: ArtifactStore, artifact: Artifact) -> bytes:
    with cache.fetch(store, artifact) as lease:
        return lease.path.read_bytes()


def left(folder: Path) -> list[Path]:
    """Return every file of a cache."""
    return [path for path in (folder / "cache").rglob("*") if path.is_file()]


def until_some_arrived(folder: Path) -> None:
    """Wait until a download has written something."""
    until = time.monotonic() + 20
    while not any(path.stat().st_size for path in left(folder)) and time.monotonic() < until:
        time.sleep(0.002)


def test_an_object_is_one_request(
    faulty_s3: FaultyS3, cache: DiskCache, store: ArtifactStore, artifact: Artifact, data: bytes
) -> None:
    """However large it is, and without asking for its size first."""
    faulty_s3.requests = 0
    assert fetched(cache, store, artifact) == data
    assert (faulty_s3.gets, faulty_s3.requests) == ([""], 1)


@pytest.mark.parametrize("fault", ["reset", "truncated", "stalled"])
def test_a_body_that_breaks_off_goes_on_where_it_broke(
    faulty_s3: FaultyS3,
    cache: DiskCache,
    store: ArtifactStore,
    artifact: Artifact,
    data: bytes,
    tmp_path: Path,
    no_pauses: None,
    fault: str,
) -> None:
    """A connection that is reset, closed, or on which nothing arrives costs one more request, for the rest."""
    faulty_s3.before_break = lambda: until_some_arrived(tmp_path)  # a reset throws away what nobody has read yet
    faulty_s3.do(fault, after=HALF)
    assert fetched(cache, store, artifact) == data
    first, second = faulty_s3.gets
    assert (first, second[:6], second[-1]) == ("", "bytes=", "-")
    assert 0 < int(second[6:-1]) <= HALF


@pytest.mark.parametrize(("fault", "times"), [("503", 4), ("500", 4), ("short", 1), ("flipped", 1), ("no ranges", 1)])
def test_what_passes_is_got_over(
    faulty_s3: FaultyS3,
    cache: DiskCache,
    store: ArtifactStore,
    artifact: Artifact,
    data: bytes,
    no_pauses: None,
    fault: str,
    times: int,
) -> None:
    """A store that is busy for a while, or once gives other bytes than its own, still gives the artifact."""
    faulty_s3.do(fault, times=times, after=HALF)
    assert fetched(cache, store, artifact) == data
    least = times + (fault != "no ranges")
    assert least <= len(faulty_s3.gets) <= least + 1  # where this machine halts, nothing arrives in time once more


def test_a_server_without_ranges_is_read_from_the_beginning(
    faulty_s3: FaultyS3, store: ArtifactStore, artifact: Artifact, data: bytes
) -> None:
    """Asked for the rest and given the whole, the bytes that were there already are left out."""
    faulty_s3.do("no ranges")
    assert store._reader is not None
    with store._reader.open(f"{store._root}/{artifact.key}", HALF, None) as opened:
        assert opened.size == SIZE
        assert b"".join(opened.pieces) == data[HALF:]


@pytest.mark.promise("P6")
@pytest.mark.parametrize(
    ("fault", "error", "said", "requests"),
    [
        ("503", BackendUnavailable, "503 SlowDown on .*, 5 times in a row", 5),
        ("500", BackendUnavailable, "500 InternalError on .*, 5 times in a row", 5),
        ("truncated", BackendUnavailable, "the connection broke .* on .*, 5 times in a row", 5),
        ("stalled", BackendUnavailable, "nothing arrived in time on .*, 5 times in a row", 5),
        ("403", BackendUnavailable, "access to .* is denied .403 AccessDenied.", 1),
        ("ExpiredToken", BackendUnavailable, "access to .* is denied .400 ExpiredToken.", 1),
        ("400", BackendUnavailable, "400 InvalidRequest on ", 1),
        ("404", LoadFailed, "the artifact store has no ", 1),
        ("no bucket", BackendUnavailable, "there is no bucket 'test-", 1),
        ("flipped", ArtifactCorrupt, "expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}", 2),
        ("short", ArtifactCorrupt, "expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}", 2),
    ],
)
def test_a_fault_that_stays_is_told_after_few_requests(
    faulty_s3: FaultyS3,
    cache: DiskCache,
    store: ArtifactStore,
    artifact: Artifact,
    tmp_path: Path,
    no_pauses: None,
    fault: str,
    error: type[ModelServeError],
    said: str,
    requests: int,
) -> None:
    """What may pass is tried five times, wrong bytes twice, a refusal once; nothing is left on the disk or leaks."""
    faulty_s3.do(fault, times=FOREVER, after=1000)
    with pytest.raises(error, match=said) as caught:
        cache.fetch(store, artifact)
    assert len(faulty_s3.gets) == requests
    assert left(tmp_path) == []
    assert not any(secret in str(caught.value) for secret in ("secret.host", "127.0.0.1", "http"))
    faulty_s3.heal()
    cache.fetch(store, artifact).release()


@pytest.mark.promise("P6")
@pytest.mark.parametrize("way", ["refused", "smaller", "no condition"])
def test_an_object_replaced_while_it_is_read_is_never_mixed(
    faulty_s3: FaultyS3,
    cache: DiskCache,
    store: ArtifactStore,
    artifact: Artifact,
    tmp_path: Path,
    no_pauses: None,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The rest of another object is not put behind the beginning of the first; after a second try it is corrupt."""
    bucket, _, prefix = faulty_s3.behind.url.removeprefix("s3://").partition("/")
    location = faulty_s3.behind.storage_options["client_kwargs"]
    client = boto3.client("s3", aws_access_key_id="test", aws_secret_access_key="test", **location)
    other = b"x" * (1000 if way == "smaller" else SIZE)
    whole = Fetching._receive
    began = []

    def replace_once(self: Fetching, *args: object) -> FileId | None:
        began.append(args)
        return whole(self, *args)  # type: ignore[arg-type]

    if way == "no condition":
        assert store._reader is not None
        fetch = store._reader._fs.call_s3  # type: ignore[attr-defined]
        monkeypatch.setattr(
            store._reader._fs,  # type: ignore[attr-defined]
            "call_s3",
            lambda *args, **options: fetch(*args, **{k: v for k, v in options.items() if k != "IfMatch"}),
        )
    monkeypatch.setattr(Fetching, "_receive", replace_once)

    def replace() -> None:
        until_some_arrived(tmp_path)
        client.put_object(Bucket=bucket, Key=f"{prefix}/{artifact.key}", Body=other)

    faulty_s3.before_break = replace
    faulty_s3.do("reset", after=HALF)
    with pytest.raises(ArtifactCorrupt) as caught:
        cache.fetch(store, artifact)
    client.close()
    assert caught.value.expected == artifact.sha256
    assert len(began) == 2
    assert len(faulty_s3.gets) == 3
    assert left(tmp_path) == []


def test_closing_ends_a_download(
    faulty_s3: FaultyS3, cache: DiskCache, store: ArtifactStore, artifact: Artifact
) -> None:
    """A server that goes does not wait for the next attempt, nor for the one after."""
    faulty_s3.do("503", times=FOREVER)
    faulty_s3.before_refusal = cache.close
    with pytest.raises(BackendUnavailable, match="closed in the middle of a download"):
        cache.fetch(store, artifact)
    assert len(faulty_s3.gets) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of one program, and no other, is Linux's to tell")
def test_a_large_object_does_not_pass_through_memory(faulty_s3: FaultyS3, store: ArtifactStore, tmp_path: Path) -> None:
    """The memory of a process that fetches 64 MB from S3 grows by far less than that."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64_000_000)
    artifact = store.put(tmp_path / "large", format="raw")
    options = dict(faulty_s3.artifacts.storage_options) | {"config_kwargs": {}}
    program = f"""
from pathlib import Path
from modelserve.artifacts import ArtifactStore, DiskCache
from modelserve.types import Artifact
store, cache = ArtifactStore({faulty_s3.artifacts.url!r}, **{options!r}), DiskCache({str(tmp_path / "cache")!r})
small = store.put_bytes(b"x" * 3_000_000, format="raw")
cache.fetch(store, small).release()
def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
before = peak()
cache.fetch(store, {artifact!r}).release()
print(peak() - before)
store.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
    assert int(done.stdout) < 16_000  # kilobytes
