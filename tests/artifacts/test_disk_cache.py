"""The disk cache: what it promises about bytes, to threads, to other processes, and to the disk."""

from __future__ import annotations

import concurrent.futures
import fcntl
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import orjson
import pytest

from modelserve.artifacts import ArtifactStore, DiskCache, default_cache_folder, files
from modelserve.errors import ArtifactCorrupt, BackendUnavailable, ConfigError, LoadFailed
from modelserve.types import Artifact
from tests import servers
from tests.artifacts.conftest import Start, flip, model_folder, put
from tests.artifacts.stores import CountingStore, FlakyStore, WaitingStore
from tests.faulty_s3 import FaultyS3


def read(cache: DiskCache, store: ArtifactStore, artifact: Artifact) -> bytes:
    """Fetch a file and let go of it."""
    with cache.fetch(store, artifact) as lease:
        return lease.path.read_bytes()


def tree(path: Path) -> dict[str, bytes]:
    """Read a folder."""
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def on_disk(folder: Path) -> set[str]:
    """Return the names under which the cache has files or manifests."""
    return {path.name for kind in ("blobs", "manifests") for path in (folder / kind / "sha256").glob("*")}


def litter(folder: Path) -> list[Path]:
    """Return what lies in the cache beside artifacts and quarantine."""
    return list((folder / "temp").iterdir())


# -- round trips -------------------------------------------------------------------------------------------


def test_a_file_lies_under_its_digest(store: CountingStore, folder: Path) -> None:
    """The path comes from the digest, and the file cannot be changed by accident."""
    artifact = put(store, b"hello")
    with DiskCache(folder).fetch(store, artifact) as lease:
        assert lease.path == folder / "blobs" / "sha256" / artifact.sha256
        assert lease.path.read_bytes() == b"hello"
        assert lease.path.stat().st_mode & 0o222 == 0
    assert litter(folder) == []


@pytest.mark.parametrize("data", [b"", b"x" * 3_000_001])
def test_any_size_comes_back(store: CountingStore, folder: Path, data: bytes) -> None:
    """An empty file is a file, and so is one of several pieces."""
    assert read(DiskCache(folder), store, put(store, data)) == data


def test_a_folder_comes_back(store: CountingStore, folder: Path, tmp_path: Path) -> None:
    """A folder has the same files under the same paths, and takes the disk once."""
    model = model_folder(tmp_path)
    with DiskCache(folder).fetch(store, store.put(model, format="saved_model")) as lease:
        assert tree(lease.path) == tree(model)
        assert all(path.stat().st_nlink == 2 for path in lease.path.rglob("*") if path.is_file())
    assert litter(folder) == []


@pytest.mark.aws
def test_artifacts_come_from_s3(s3_artifacts_url: servers.S3Artifacts, folder: Path, tmp_path: Path) -> None:
    """Files and folders arrive from S3 as they do from a disk."""
    store, cache = ArtifactStore(s3_artifacts_url.url, **s3_artifacts_url.storage_options), DiskCache(folder)
    data, model = os.urandom(9_000_000), model_folder(tmp_path)
    assert read(cache, store, put(store, data)) == data
    with cache.fetch(store, store.put(model, format="saved_model")) as lease:
        assert tree(lease.path) == tree(model)
    with pytest.raises(LoadFailed, match="the artifact store has no"):
        cache.fetch(store, artifact_of("0" * 64))
    store.close()


def test_a_restart_reads_nothing_from_the_store(store: CountingStore, folder: Path, tmp_path: Path) -> None:
    """What is on the disk serves a new process while the store is away."""
    artifacts = [put(store, b"hello"), store.put(model_folder(tmp_path), format="saved_model")]
    for artifact in artifacts:
        DiskCache(folder).fetch(store, artifact).release()
    store.reads.clear()
    restarted = DiskCache(folder)
    for artifact in artifacts:
        restarted.fetch(store, artifact).release()
    assert store.reads == []


@pytest.mark.promise("P6")
@pytest.mark.parametrize("name", ["saved_model.pb", "variables/data"])
def test_a_file_changed_in_place_is_found_by_the_cache_that_has_hashed_it(
    store: CountingStore, folder: Path, tmp_path: Path, name: str
) -> None:
    """Under the same name, in the same file, of the same size and age: nothing that was known of it is believed."""
    model = model_folder(tmp_path)
    artifact, cache = store.put(model, format="saved_model"), DiskCache(folder)
    with cache.fetch(store, artifact) as lease:
        before = (lease.path / name).stat()
        flip(lease.path / name)
        os.utime(lease.path / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        with cache.fetch(store, artifact) as again:
            assert tree(again.path) == tree(model)
            assert again.files != lease.files


def test_a_file_put_in_place_of_a_verified_one_is_verified_again(store: CountingStore, folder: Path) -> None:
    """Trust goes to the bytes that were hashed, not to the name they had."""
    artifact, cache = put(store, b"hello"), DiskCache(folder)
    read(cache, store, artifact)
    (folder / "other").write_bytes(b"jello")
    (folder / "other").replace(folder / artifact.key)
    assert read(cache, store, artifact) == b"hello"


def test_a_cache_that_was_deleted_fills_again(store: CountingStore, folder: Path, tmp_path: Path) -> None:
    """Somebody may empty the folder at any time."""
    cache, artifact = DiskCache(folder), store.put(model_folder(tmp_path), format="saved_model")
    cache.fetch(store, artifact).release()
    shutil.rmtree(folder)
    with cache.fetch(store, artifact) as lease:
        assert len(tree(lease.path)) == 3


def test_a_large_file_does_not_pass_through_memory(store: CountingStore, folder: Path, tmp_path: Path) -> None:
    """Downloading and verifying take a few pieces of memory, whatever the size."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * 2**20)
    artifact = store.put(tmp_path / "large", format="raw")
    tracemalloc.start()
    try:
        DiskCache(folder).fetch(store, artifact).release()
        DiskCache(folder).fetch(store, artifact).release()
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


# -- bytes that are not the registered ones ----------------------------------------------------------------


def test_a_bit_that_flipped_on_the_disk_is_set_aside_and_fetched_again(store: CountingStore, folder: Path) -> None:
    """A process never uses what it did not verify, and keeps the evidence."""
    artifact = put(store, b"hello")
    read(DiskCache(folder), store, artifact)
    flip(folder / artifact.key)
    damaged = (folder / artifact.key).read_bytes()
    assert read(DiskCache(folder), store, artifact) == b"hello"
    assert [path.read_bytes() for path in (folder / "quarantine").iterdir()] == [damaged]
    assert store.reads == [artifact.key] * 2


@pytest.mark.parametrize("damage", ["blob", "manifest", "tree"])
def test_a_folder_with_a_flipped_bit_is_made_again(
    store: CountingStore, folder: Path, tmp_path: Path, damage: str
) -> None:
    """A bit that flips in a blob, in the manifest or in a file of the folder itself is found."""
    model = model_folder(tmp_path)
    artifact = store.put(model, format="saved_model")
    with DiskCache(folder).fetch(store, artifact) as lease:
        file = lease.path / "variables" / "data"
    if damage == "tree":
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    flip(folder / artifact.key if damage == "manifest" else file)
    with DiskCache(folder).fetch(store, artifact) as lease:
        assert tree(lease.path) == tree(model)


@pytest.mark.parametrize("change", ["planted.py", "variables/link", "missing"])
def test_a_folder_has_the_files_of_its_manifest_and_no_others(
    store: CountingStore, folder: Path, tmp_path: Path, change: str
) -> None:
    """What was added to a folder, or taken from it, is undone before it is used again."""
    model = model_folder(tmp_path)
    artifact = store.put(model, format="saved_model")
    cache = DiskCache(folder)
    with cache.fetch(store, artifact) as lease:
        if change == "missing":
            (lease.path / "saved_model.pb").unlink()
        elif change.endswith("link"):
            (lease.path / change).symlink_to(tmp_path)
        else:
            (lease.path / change).write_text("import os")
    with cache.fetch(store, artifact) as lease:
        assert tree(lease.path) == tree(model)
        assert not any(path.is_symlink() for path in lease.path.rglob("*"))


def test_a_bit_that_flipped_in_the_store_is_never_visible(store: CountingStore, root: str, folder: Path) -> None:
    """The error names both digests, and nothing lies under the name of the artifact."""
    artifact = put(store, b"hello")
    flip(Path(root, artifact.key))
    with pytest.raises(ArtifactCorrupt) as caught:
        DiskCache(folder).fetch(store, artifact)
    assert (caught.value.key, caught.value.expected) == (artifact.key, artifact.sha256)
    assert caught.value.found == files.digest_of([Path(root, artifact.key).read_bytes()])[0]
    assert on_disk(folder) == set()
    assert litter(folder) == []


def test_a_file_of_a_folder_that_flipped_in_the_store_is_never_visible(
    store: CountingStore, root: str, folder: Path, tmp_path: Path
) -> None:
    """A folder is there as a whole or not at all."""
    artifact = store.put(model_folder(tmp_path), format="saved_model")
    weights = files.digest_of([b"weights" * 1000])[0]
    flip(Path(root, "blobs", "sha256", weights))
    with pytest.raises(ArtifactCorrupt, match=weights):
        DiskCache(folder).fetch(store, artifact)
    assert not (folder / "trees" / "sha256" / artifact.sha256).exists()
    assert weights not in on_disk(folder)
    assert litter(folder) == []


def test_bad_here_and_bad_there_is_corrupt(store: CountingStore, root: str, folder: Path) -> None:
    """When the second copy is no better, there is no artifact; a put heals both."""
    artifact = put(store, b"hello")
    read(DiskCache(folder), store, artifact)
    flip(folder / artifact.key)
    flip(Path(root, artifact.key))
    cache = DiskCache(folder)
    with pytest.raises(ArtifactCorrupt):
        cache.fetch(store, artifact)
    put(store, b"hello")
    assert read(cache, store, artifact) == b"hello"


def test_the_quarantine_is_bounded(store: CountingStore, folder: Path) -> None:
    """A disk that goes bad does not fill up with the evidence."""
    artifact = put(store, b"hello")
    for _ in range(12):
        read(DiskCache(folder), store, artifact)
        flip(folder / artifact.key)
    assert len(list((folder / "quarantine").iterdir())) == 8


@pytest.mark.parametrize(
    ("fault", "times", "starts"),
    [
        ("ends early", 2, [0, 2500, 3750]),
        ("breaks off", 2, [0, 2500, 3750]),
        ("ends at once", 2, [0, 0, 0]),
        ("does not answer", 4, [0] * 5),
        ("is replaced", 1, [0, 0]),
        ("flips a bit", 1, [0, 0]),
        ("does not end", 1, [0, 0]),
    ],
)
def test_a_stream_that_fails_is_tried_again(
    root: str, folder: Path, no_pauses: None, fault: str, times: int, starts: list[int]
) -> None:
    """What broke off goes on where it broke, what came out wrong starts over once."""
    store = FlakyStore(root, fault, times)
    artifact = put(store, b"hello" * 1000)
    assert read(DiskCache(folder), store, artifact) == b"hello" * 1000
    assert store.starts == starts
    assert litter(folder) == []


@pytest.mark.parametrize(
    ("fault", "error", "attempts"),
    [
        ("breaks off", BackendUnavailable, 5),
        ("does not answer", BackendUnavailable, 5),
        ("does not end", ArtifactCorrupt, 2),
        ("flips a bit", ArtifactCorrupt, 2),
        ("is replaced", ArtifactCorrupt, 2),
        ("refuses", BackendUnavailable, 1),
    ],
)
def test_attempts_are_bounded(
    root: str, folder: Path, no_pauses: None, fault: str, error: type[Exception], attempts: int
) -> None:
    """A stream that never comes right ends in an error, and a store that is away is not asked for ever."""
    store = FlakyStore(root, fault, times=99)
    artifact = put(store, b"hello" * 1000)
    with pytest.raises(error):
        DiskCache(folder).fetch(store, artifact)
    assert len(store.reads) == attempts
    assert on_disk(folder) == set()
    assert litter(folder) == []


class CutShort(http.server.BaseHTTPRequestHandler):
    """Answers like S3, promises a hundred bytes, and hangs up after fifty."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"x" * 50)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.aws
def test_a_reply_shorter_than_its_headers_say_is_never_visible(folder: Path, no_pauses: None) -> None:
    """A server that always hangs up in the middle of a reply costs a few attempts, not the truth."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CutShort) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        endpoint = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "us-east-1"}
        store = ArtifactStore("s3://bucket/models", key="test", secret="test", client_kwargs=endpoint)
        with pytest.raises(BackendUnavailable, match="artifact store"):
            DiskCache(folder).fetch(store, artifact_of(files.digest_of([b"x" * 100])[0], size=100))
        store.close()
        server.shutdown()
        serving.join()
    assert on_disk(folder) == set()
    assert litter(folder) == []


def test_what_is_missing_or_forbidden_is_asked_for_once(
    store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking again would not help."""
    with pytest.raises(LoadFailed, match="the artifact store has no"):
        DiskCache(folder).fetch(store, artifact_of("0" * 64))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(store._fs, "open", denied)
    with pytest.raises(BackendUnavailable, match="denied"):
        DiskCache(folder).fetch(store, artifact_of("1" * 64))
    assert len(store.reads) == 2


# -- hostile rows and manifests ----------------------------------------------------------------------------


def artifact_of(sha256: str, *, key: str | None = None, size: int = 10) -> Artifact:
    """Describe an artifact as a row of the registry could."""
    return Artifact(key=f"blobs/sha256/{sha256}" if key is None else key, sha256=sha256, size=size, format="raw")


@pytest.mark.parametrize("sha256", ["../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "/.."])
def test_a_hostile_digest_makes_no_path(store: CountingStore, folder: Path, sha256: str) -> None:
    """A digest that is none is refused before anything is looked up."""
    with pytest.raises(LoadFailed, match="no artifact key"):
        DiskCache(folder).fetch(store, artifact_of(sha256))
    assert store.reads == []


def test_a_key_of_other_bytes_is_refused(store: CountingStore, folder: Path) -> None:
    """A row that names verified bytes by one digest and others by the key gets neither."""
    good, other = put(store, b"good"), put(store, b"other")
    cache = DiskCache(folder)
    read(cache, store, good)
    with pytest.raises(ArtifactCorrupt):
        cache.fetch(store, artifact_of(good.sha256, key=other.key))


def test_a_file_is_not_taken_for_a_manifest(store: CountingStore, folder: Path) -> None:
    """Verified bytes under one kind of key say nothing about those under the other."""
    data = orjson.dumps([{"path": "../../escaped", "sha256": "0" * 64, "size": 1}])
    artifact, cache = put(store, data), DiskCache(folder)
    read(cache, store, artifact)
    with pytest.raises(LoadFailed, match="has no manifests"):
        cache.fetch(store, artifact_of(artifact.sha256, key=artifact.key.replace("blobs", "manifests")))


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "a/../../../escaped"])  # noqa: S108  # hostile on purpose
def test_a_hostile_manifest_writes_nothing(store: CountingStore, root: str, folder: Path, path: str) -> None:
    """A manifest that hashes to its name is still not trusted with paths."""
    file = put(store, b"hello")
    data = orjson.dumps([{"path": path, "sha256": file.sha256, "size": 5}])
    sha256 = files.digest_of([data])[0]
    manifest = Path(root, "manifests", "sha256", sha256)
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(data)
    with pytest.raises(LoadFailed, match="no path inside it"):
        DiskCache(folder).fetch(store, artifact_of(sha256, key=f"manifests/sha256/{sha256}"))
    assert not list(folder.parent.rglob("escaped"))
    assert not (folder / "trees").exists()


# -- threads and processes ---------------------------------------------------------------------------------


def test_sixteen_threads_download_once(root: str, folder: Path) -> None:
    """Threads that want the same artifact wait for the one that fetches it."""
    store, cache = WaitingStore(root), DiskCache(folder)
    artifact = put(store, b"hello")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        fetched = [pool.submit(read, cache, store, artifact) for _ in range(16)]
        assert store.is_half_way.wait(30)
        store.may_go_on.set()
        assert [each.result(30) for each in fetched] == [b"hello"] * 16
    assert store.reads == [artifact.key]


def test_one_download_does_not_hold_up_another(root: str, store: CountingStore, folder: Path) -> None:
    """Artifacts do not wait for each other."""
    slow, cache = WaitingStore(root), DiskCache(folder, max_bytes=1)
    artifact, other = put(store, b"hello"), put(store, b"other")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(read, cache, slow, artifact)
        assert slow.is_half_way.wait(30)
        assert read(cache, store, other) == b"other"
        slow.may_go_on.set()
        assert fetched.result(30) == b"hello"


def let_all_go_on(running: list[subprocess.Popen[str]]) -> list[str]:
    """Answer each before waiting for any: they may wait for each other."""
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate()[0] for process in running]


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_processes_killed_in_a_download_leave_nothing_behind(
    store: CountingStore, folder: Path, start: Start, locks: str
) -> None:
    """Eight processes fetch into a cold folder, half of them are killed half-way; the others get the artifact."""
    artifact = put(store, os.urandom(1_000_001))
    reports, report = os.pipe()
    running = [start("download", artifact, str(report), locks, pass_fds=(report,)) for _ in range(8)]
    with open(reports, encoding="ascii") as lines:  # noqa: PTH123  # a pipe has no path
        os.close(report)
        for _ in range(4):
            pid = int(next(lines))
            victim = next(each for each in running if each.pid == pid)
            victim.kill()
            victim.communicate()
            running.remove(victim)
        answers = let_all_go_on(running)
    assert answers == [f"{artifact.sha256}\n"] * 4
    left = DiskCache(folder)
    assert litter(folder) == []
    store.reads.clear()
    assert len(read(left, store, artifact)) == artifact.size
    assert store.reads == []
    assert on_disk(folder) == {artifact.sha256}


@pytest.mark.slow
@pytest.mark.timeout(180)  # sixteen interpreters and drivers have to start
@pytest.mark.promise("P6")
@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_sixteen_processes_killed_by_half_start_cold_from_s3(
    faulty_s3: FaultyS3, folder: Path, start: Start, locks: str
) -> None:
    """Whoever survives has the artifact; with locks the store is asked once more for each that died fetching."""
    store = ArtifactStore(faulty_s3.artifacts.url, **faulty_s3.artifacts.storage_options)
    artifact = put(store, os.urandom(8_000_000))
    store.close()
    options = json.dumps(dict(faulty_s3.artifacts.storage_options) | {"config_kwargs": {}})
    running = [start("cold-start", artifact, options, locks, url=faulty_s3.artifacts.url) for _ in range(16)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    faulty_s3.do("stalled", times=1 if locks == "with locks" else 16, after=2_000_000)
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert faulty_s3.seen.wait(30)
    writers = {int(path.name.split("-")[-2]) for path in _drafts_of(folder, 1 if locks == "with locks" else 8)}
    victims = sorted(running, key=lambda each: each.pid not in writers)[:8]
    for process in victims:
        process.kill()
        process.communicate()
    faulty_s3.heal()
    faulty_s3.ended.set()
    survivors = [process for process in running if process not in victims]
    answers = [process.communicate(timeout=120)[0] for process in survivors]
    print(f"{locks}: {len(faulty_s3.gets)} GETs, {faulty_s3.sent / artifact.size:.1f} times its bytes")
    assert answers == [f"{artifact.sha256}\n"] * 8
    assert len(faulty_s3.gets) <= (3 if locks == "with locks" else 32)
    DiskCache(folder)
    assert litter(folder) == []
    assert on_disk(folder) == {artifact.sha256}


def _drafts_of(folder: Path, count: int) -> list[Path]:
    """Wait until so many processes have begun to write."""
    until = time.monotonic() + 30
    while len(found := list((folder / "temp").glob(".*.draft"))) < count and time.monotonic() < until:
        threading.Event().wait(0.02)
    return found


def test_processes_download_one_after_the_other(
    root: str, store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited for another's download uses it. Two caches are to each other as two processes."""
    slow, artifact, waits = WaitingStore(root), put(store, b"hello"), threading.Event()
    monkeypatch.setattr(time, "sleep", lambda _: waits.set())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, DiskCache(folder), slow, artifact)
        assert slow.is_half_way.wait(30)
        second = pool.submit(read, DiskCache(folder), store, artifact)
        assert waits.wait(30)
        slow.may_go_on.set()
        assert (first.result(30), second.result(30)) == (b"hello", b"hello")
    assert store.reads == []


def test_one_process_does_not_set_aside_what_another_made_good(store: CountingStore, folder: Path) -> None:
    """Two processes that find the same damage replace it once."""
    artifact, cache = put(store, b"hello"), DiskCache(folder)
    read(cache, store, artifact)
    flip(folder / artifact.key)
    found = files.hold(folder / artifact.key)
    assert found is not None
    assert read(DiskCache(folder), store, artifact) == b"hello"
    cache._layout.set_aside(artifact.key, found)
    assert (folder / artifact.key).read_bytes() == b"hello"
    assert len(list((folder / "quarantine").iterdir())) == 1


def test_a_cache_copied_by_fork_works(store: CountingStore, start: Start) -> None:
    """A child forked in the middle of a download fetches the same artifact, and keeps none of the parent's locks."""
    artifact, held = put(store, b"x" * 100_000), put(store, b"held" * 5)
    process = start("fork", artifact, held.key)
    assert process.communicate()[0] == "child 0\n"
    assert process.returncode == 0


def test_processes_may_race_for_a_folder(
    store: CountingStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches that build the same folder at once, without locks, all end with a whole one that stays where it is."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    model = model_folder(tmp_path)
    artifact = store.put(model, format="saved_model")
    barrier = threading.Barrier(8)

    def fetch_and_look() -> list[dict[str, bytes]]:
        cache = DiskCache(folder)
        barrier.wait(30)
        with cache.fetch(store, artifact) as lease:
            return [tree(lease.path) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        seen = [pool.submit(fetch_and_look) for _ in range(8)]
    assert all(each == tree(model) for one in seen for each in one.result())
    assert litter(folder) == []


# -- the bound ---------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(store: CountingStore, folder: Path) -> None:
    """A use counts as much as a download."""
    a, b, c, d = (put(store, letter * 10) for letter in (b"a", b"b", b"c", b"d"))
    cache = DiskCache(folder, max_bytes=30)
    for artifact in (a, b, c, a, d):
        read(cache, store, artifact)
    assert on_disk(folder) == {a.sha256, c.sha256, d.sha256}


def test_what_is_spared_goes_last(store: CountingStore, folder: Path) -> None:
    """It outlives what was used after it, but not the bound."""
    spared, *others = (put(store, letter * 10) for letter in (b"s", b"a", b"b", b"c"))
    cache = DiskCache(folder, max_bytes=20, spared=lambda: {spared.key})
    for artifact in (spared, *others):
        read(cache, store, artifact)
    assert on_disk(folder) == {spared.sha256, others[-1].sha256}
    big = put(store, b"d" * 20)
    read(cache, store, big)
    assert spared.sha256 not in on_disk(folder)


def test_without_a_bound_everything_stays(store: CountingStore, folder: Path) -> None:
    """None means none."""
    cache = DiskCache(folder)
    for i in range(5):
        read(cache, store, put(store, bytes([i]) * 1000))
    assert len(on_disk(folder)) == 5


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_what_is_leased_stays(store: CountingStore, folder: Path, locks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease outlives any pressure, until the last of several is released."""
    if locks == "without locks":
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    cache, leased = DiskCache(folder, max_bytes=1), put(store, b"leased")
    first, second = cache.fetch(store, leased), cache.fetch(store, leased)
    first.release()
    first.release()
    read(cache, store, put(store, b"x"))
    assert second.path.read_bytes() == b"leased"
    second.release()
    read(cache, store, put(store, b"y"))
    assert leased.sha256 not in on_disk(folder)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_leases_stays(
    store: CountingStore, folder: Path, tmp_path: Path, start: Start, kind: str
) -> None:
    """A lease of one process binds the eviction of the others, and ends with the process."""
    leased = put(store, b"leased") if kind == "file" else store.put(model_folder(tmp_path), format="saved_model")
    holder = start("lease", leased)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "leased\n"
    cache = DiskCache(folder, max_bytes=1)
    read(cache, store, put(store, b"x"))
    assert leased.sha256 in on_disk(folder)
    assert holder.communicate("go\n")[0] in {"leased\n", "['data', 'saved_model.pb', 'variables', 'variables.index']\n"}
    read(cache, store, put(store, b"y"))
    assert on_disk(folder) == {put(store, b"y").sha256}
    assert not list((folder / "trees" / "sha256").glob("*"))


def test_a_folder_goes_with_its_files_and_leaves_those_of_another(
    store: CountingStore, folder: Path, tmp_path: Path
) -> None:
    """A bound on bytes counts what folders hold, and a file of two folders goes with the second."""
    one, two = model_folder(tmp_path), tmp_path / "two"
    two.mkdir()
    shutil.copy(one / "saved_model.pb", two)
    first, second = store.put(one, format="a"), store.put(two, format="a")
    cache = DiskCache(folder, max_bytes=7100)
    for artifact in (first, second):
        cache.fetch(store, artifact).release()
    assert on_disk(folder) == {second.sha256, files.digest_of([b"graph"])[0]}
    with cache.fetch(store, second) as lease:
        assert tree(lease.path) == {"saved_model.pb": b"graph"}
    with cache.fetch(store, first) as lease:
        assert tree(lease.path) == tree(one)


def test_caches_that_evict_each_others_files_serve_the_right_bytes(
    store: CountingStore, folder: Path, tmp_path: Path
) -> None:
    """Under constant eviction by others, what is leased is there, whole, until it is released."""
    model = model_folder(tmp_path)
    artifacts = [put(store, b"one"), store.put(model, format="a"), put(store, b"graph")]
    expected = [b"one", tree(model), b"graph"]

    def fetch_all() -> None:
        cache = DiskCache(folder, max_bytes=1)
        for artifact, content in [*zip(artifacts, expected, strict=True)] * 40:
            with cache.fetch(store, artifact) as lease:
                assert (tree(lease.path) if lease.path.is_dir() else lease.path.read_bytes()) == content

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(fetch_all) for _ in range(4)]:
            each.result()
    assert litter(folder) == []


def test_what_is_not_ours_is_not_evicted(store: CountingStore, folder: Path) -> None:
    """A stray file is nobody's artifact."""
    cache = DiskCache(folder, max_bytes=1)
    read(cache, store, put(store, b"x"))
    stray = folder / "blobs" / "sha256" / "README"
    stray.write_text("hands off")
    read(cache, store, put(store, b"y"))
    assert stray.exists()


def test_what_cannot_be_removed_fails_no_fetch(
    store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An artifact that was fetched is handed out, whatever the eviction met."""
    cache = DiskCache(folder, max_bytes=1)
    first = put(store, b"first")
    read(cache, store, first)

    def denied(_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "claim", denied)
    assert read(cache, store, put(store, b"second")) == b"second"
    assert f"cannot remove {first.key}" in caplog.text


# -- the disk ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_as_such(store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to look at, nothing half-written stays, and the next attempt may succeed."""
    artifact, cache = put(store, b"hello"), DiskCache(folder)

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(BackendUnavailable, match="artifact cache is unavailable: No space left on device"):
            cache.fetch(store, artifact)
    assert on_disk(folder) == set()
    assert litter(folder) == []
    assert len(store.reads) == 1
    assert read(cache, store, artifact) == b"hello"


def with_free(monkeypatch: pytest.MonkeyPatch, total: int, folder: Path) -> None:
    """Let the cache lie on a disk of so many bytes, on which there is nothing else."""

    def usage(_: Path) -> object:
        used = sum(path.stat().st_size for kind in ("blobs", "manifests") for path in (folder / kind).rglob("?" * 64))
        return shutil._ntuple_diskusage(total, used, total - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_what_does_not_fit_is_not_begun(store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how many bytes are missing and what to do; the store is not asked, and nothing else goes."""
    cache, first, second = DiskCache(folder), put(store, b"a" * 60), put(store, b"b" * 70)
    with_free(monkeypatch, 100, folder)
    read(cache, store, first)
    with pytest.raises(BackendUnavailable, match=r"takes 70 bytes, which is 30 more than .* `modelserve cache prune`"):
        cache.fetch(store, second)
    assert store.reads == [first.key]
    assert on_disk(folder) == {first.sha256}


def test_a_bounded_cache_makes_room(store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be evicted is, as far as needed; what is in use stays, and then the error says so."""
    cache = DiskCache(folder, max_bytes=1000)
    oldest, newer, leased, large = (put(store, letter * 30) for letter in (b"a", b"b", b"c", b"d"))
    for artifact in (oldest, newer):
        read(cache, store, artifact)
    with_free(monkeypatch, 100, folder)
    with cache.fetch(store, leased):
        assert read(cache, store, large) == b"d" * 30
        assert on_disk(folder) == {newer.sha256, leased.sha256, large.sha256}
        with pytest.raises(BackendUnavailable, match="10 more than the disk has free"):
            cache.fetch(store, put(store, b"e" * 80))
        assert leased.sha256 in on_disk(folder)


def test_a_folder_that_does_not_fit_is_not_begun(
    store: CountingStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the files that are missing count together, before the first of them is fetched."""
    artifact = store.put(model_folder(tmp_path), format="a")
    with_free(monkeypatch, 7100, folder)
    with pytest.raises(BackendUnavailable, match=f"{artifact.key} takes 7005 bytes"):
        DiskCache(folder).fetch(store, artifact)
    assert store.reads == [artifact.key]


# -- looking after it --------------------------------------------------------------------------------------


def test_what_lies_there_is_listed(store: CountingStore, folder: Path, tmp_path: Path) -> None:
    """Files, folders and what was set aside, with their sizes; a part of a leased folder is in use."""
    cache = DiskCache(folder)
    file, model = put(store, b"hello"), store.put(model_folder(tmp_path), format="a")
    read(cache, store, file)
    flip(folder / file.key)
    read(DiskCache(folder), store, file)
    with cache.fetch(store, model):
        found = {each.key: each for each in DiskCache(folder).entries()}
        graph = found[f"blobs/sha256/{files.digest_of([b'graph'])[0]}"]
        assert (graph.kind, graph.size, graph.in_use) == ("file", 5, True)
        assert (found[model.key].kind, found[model.key].in_use) == ("folder", True)
        assert graph.key in found[model.key].parts
        assert not found[file.key].in_use
        assert [each.kind for each in found.values()].count("quarantined") == 1
    assert not any(each.in_use for each in cache.entries())


def test_pruning_takes_what_is_not_in_use(store: CountingStore, folder: Path, tmp_path: Path) -> None:
    """A dry run only tells; the real one leaves what is leased, and a cache that still works."""
    cache = DiskCache(folder)
    leased, idle, model = put(store, b"leased"), put(store, b"idle"), store.put(model_folder(tmp_path), format="a")
    with cache.fetch(store, leased):
        for artifact in (idle, model):
            cache.fetch(store, artifact).release()
        planned = DiskCache(folder).prune(dry_run=True)
        assert len(on_disk(folder)) == 6
        assert DiskCache(folder).prune() == planned
        assert on_disk(folder) == {leased.sha256}
        assert not list((folder / "trees" / "sha256").iterdir())
    with cache.fetch(store, model) as lease:
        assert len(tree(lease.path)) == 3


@pytest.mark.promise("P6")
@pytest.mark.parametrize("damage", ["blob", "manifest", "tree", "planted"])
def test_verifying_takes_out_what_is_damaged(store: CountingStore, folder: Path, tmp_path: Path, damage: str) -> None:
    """A flipped bit, wherever it is, is found; its file is set aside, and a folder made of it is gone."""
    cache = DiskCache(folder)
    file, model = put(store, b"hello"), store.put(model_folder(tmp_path), format="a")
    read(cache, store, file)
    with cache.fetch(store, model) as lease:
        target = lease.path / "variables" / "data"
    assert all(each.sound for each in cache.verify())
    assert {each.key for each in cache.verify()} > {file.key, model.key, f"trees/sha256/{model.sha256}"}
    if damage == "tree":
        target.unlink()
        target.write_bytes(b"weights" * 1000)
    if damage == "planted":
        (lease.path / "planted.py").touch()
    else:
        flip(folder / model.key if damage == "manifest" else target)
    bad = {each.key for each in cache.verify() if not each.sound}
    assert f"trees/sha256/{model.sha256}" in bad
    assert file.key not in bad
    assert not lease.path.exists()
    assert len(list((folder / "quarantine").glob("*"))) == (damage in {"blob", "manifest"})
    assert all(each.sound for each in cache.verify())
    with cache.fetch(store, model) as again:
        assert tree(again.path) == tree(tmp_path / "model")


def test_who_gets_on_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the last sign of life, and ends when what waits has no time left."""
    clock, beats = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with files.turn(folder, "x", 10.0) as get_on:

        def pass_time(_: float) -> None:
            clock[0] += 9.0
            if len(beats) < 5:
                beats.append(clock[0])
                get_on()

        monkeypatch.setattr(time, "sleep", pass_time)
        with files.turn(folder, "x", 10.0):
            assert clock[0] == 63.0

        def no_time() -> None:
            raise BackendUnavailable("artifact store", "no time")

        with (
            pytest.raises(BackendUnavailable, match="no time"),
            files.turn(folder, "y", 10.0),
            files.turn(folder, "y", 10.0, no_time),
        ):
            pytest.fail("it came in")


def test_a_folder_that_cannot_be_made_is_told_as_such(tmp_path: Path) -> None:
    """A cache opens or says why not."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache_dir: .*/file/cache cannot be used: Not a directory"):
        DiskCache(tmp_path / "file" / "cache")


def test_opening_removes_old_litter(store: CountingStore, folder: Path) -> None:
    """What a process left that was killed on another machine goes after an hour."""
    read(DiskCache(folder), store, put(store, b"x"))
    draft = folder / "temp" / f".other-host-1-{'0' * 32}.draft"
    draft.touch()
    DiskCache(folder)
    assert draft.exists()
    os.utime(draft, times=(time.time() - 3601,) * 2)
    DiskCache(folder)
    assert not draft.exists()


@pytest.mark.parametrize(
    ("platform", "xdg", "expected"),
    [
        ("linux", None, ".cache/modelserve"),
        ("linux", "", ".cache/modelserve"),
        ("linux", "relative", ".cache/modelserve"),
        ("linux", "/var/cache/me", "/var/cache/me/modelserve"),
        ("darwin", None, "Library/Caches/modelserve"),
    ],
)
def test_the_default_folder_is_the_users(
    monkeypatch: pytest.MonkeyPatch, platform: str, xdg: str | None, expected: str
) -> None:
    """Every system has its place for caches, and the user a variable to move it."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert default_cache_folder() == Path.home() / expected
