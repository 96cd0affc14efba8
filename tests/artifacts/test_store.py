"""The artifact store, over a local folder, memory and a real S3 protocol server."""

from __future__ import annotations

import builtins
import concurrent.futures
import hashlib
import os
import shutil
import sys
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelserve.artifacts import ArtifactStore, files
from modelserve.errors import BackendUnavailable, ConfigError, InvalidInput, LoadFailed, MissingDependency
from tests import servers
from tests.artifacts.conftest import flip, model_folder, put

MISSING = f"blobs/sha256/{'0' * 64}"


@pytest.fixture(params=["folder", "file://", "memory://", pytest.param("s3://", marks=pytest.mark.aws)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """An empty store of every kind."""
    options: dict[str, Any] = {}
    match request.param:
        case "folder":
            url = str(tmp_path / "store")
        case "file://":
            url = f"file://{tmp_path}/store"
        case "memory://":
            url = f"memory://{uuid.uuid4().hex}/models"
        case _:
            s3: servers.S3Artifacts = request.getfixturevalue("s3_artifacts_url")
            url, options = s3.url, dict(s3.storage_options)
    store = ArtifactStore(url, **options)
    yield store
    store.close()


def content(store: ArtifactStore, key: str) -> bytes:
    """Read an object."""
    return b"".join(store.read(key))


def test_a_file_comes_back(any_store: ArtifactStore, tmp_path: Path) -> None:
    """The key, the digest and the size are those of the bytes, and the bytes are the same."""
    data = os.urandom(3_000_000)
    (tmp_path / "model.bin").write_bytes(data)
    artifact = any_store.put(tmp_path / "model.bin", format="skops")
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert artifact.key == f"blobs/sha256/{artifact.sha256}"
    assert (artifact.size, artifact.format) == (len(data), "skops")
    assert content(any_store, artifact.key) == data


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 2_000_000])
def test_bytes_come_back(any_store: ArtifactStore, data: bytes) -> None:
    """Bytes need no file, and may be none."""
    artifact = put(any_store, data)
    assert (content(any_store, artifact.key), artifact.size) == (data, len(data))


def test_a_folder_is_its_manifest_and_its_files(any_store: ArtifactStore, tmp_path: Path) -> None:
    """The digest is that of the manifest, the size that of the files, and each file is an object of its own."""
    artifact = any_store.put(model_folder(tmp_path), format="saved_model")
    manifest = content(any_store, artifact.key)
    assert artifact.sha256 == hashlib.sha256(manifest).hexdigest()
    assert artifact.key == f"manifests/sha256/{artifact.sha256}"
    assert artifact.size == len(b"graph") + len(b"weights" * 1000)
    assert content(any_store, f"blobs/sha256/{hashlib.sha256(b'graph').hexdigest()}") == b"graph"


def test_the_same_bytes_are_the_same_artifact(any_store: ArtifactStore, tmp_path: Path) -> None:
    """Putting twice changes nothing, neither for a file nor for a folder."""
    folder = model_folder(tmp_path)
    assert any_store.put(folder, format="a") == any_store.put(folder, format="a")
    assert put(any_store, b"graph") == put(any_store, b"graph")


def test_a_missing_object_is_named(any_store: ArtifactStore) -> None:
    """What is not there will not be there at the next attempt either."""
    with pytest.raises(LoadFailed, match=MISSING):
        content(any_store, MISSING)


@pytest.mark.parametrize("key", ["../secret", "/etc/passwd", "blobs/sha256/../../../secret", MISSING + "/..", ""])
def test_only_keys_are_read(any_store: ArtifactStore, key: str) -> None:
    """A key from a row that somebody else wrote leads nowhere else."""
    with pytest.raises(LoadFailed, match="no artifact key"):
        content(any_store, key)


def test_a_store_answers(any_store: ArtifactStore) -> None:
    """An empty store answers, and so does one with something in it."""
    any_store.ping()
    put(any_store, b"x")
    any_store.ping()


def test_a_closed_store_opens_again(any_store: ArtifactStore) -> None:
    """Closing ends connections, not the store."""
    artifact = put(any_store, b"x")
    any_store.close()
    any_store.close()
    assert content(any_store, artifact.key) == b"x"


def test_threads_read_one_object(any_store: ArtifactStore) -> None:
    """Readers at the same time do not get each other's bytes."""
    data = os.urandom(3_000_000)
    artifact = put(any_store, data)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(content, [any_store] * 16, [artifact.key] * 16))
    assert all(each == data for each in found)


def test_readers_have_places_of_their_own(any_store: ArtifactStore) -> None:
    """Whoever begins to read an object does not move another who is in the middle of it."""
    data = os.urandom(3_000_000)
    artifact = put(any_store, data)
    first, second = any_store.read(artifact.key), any_store.read(artifact.key)
    begun = next(first), next(second)
    assert [begun[0] + b"".join(first), begun[1] + b"".join(second)] == [data, data]


def test_a_forked_child_uses_the_store(any_store: ArtifactStore) -> None:
    """Connections of the parent are not used by a child, nor closed by it."""
    artifact = put(any_store, b"x")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(content(any_store, artifact.key) != b"x")
            any_store.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert content(any_store, artifact.key) == b"x"


# -- a local folder ----------------------------------------------------------------------------------------


def test_a_damaged_object_heals(store: ArtifactStore, root: str) -> None:
    """Putting the same bytes again repairs what was flipped or cut off."""
    artifact = put(store, b"hello")
    flip(Path(root, artifact.key))
    assert content(store, artifact.key) != b"hello"
    put(store, b"hello")
    assert content(store, artifact.key) == b"hello"


def test_a_put_that_fails_leaves_nothing(
    store: ArtifactStore, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is told as such; half an object is nowhere, not even under another name."""
    (tmp_path / "model").write_bytes(b"hello")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        for attempt in ("file", "bytes"):
            with pytest.raises(BackendUnavailable, match="artifact store"):
                store.put(tmp_path / "model", format="raw") if attempt == "file" else put(store, b"hello")
    assert [path for path in Path(root).rglob("*") if path.is_file()] == []


def test_a_killed_writer_leaves_litter_until_the_next_put(store: ArtifactStore, root: str) -> None:
    """Drafts of dead processes go when the folder is next written to."""
    put(store, b"x")
    litter = Path(root, "blobs", "sha256", f".{os.uname().nodename}-{2**22 + 1}-{'0' * 32}.draft")
    litter.touch()
    put(store, b"x")
    assert not litter.exists()


def test_a_file_that_changes_meanwhile_is_not_stored(
    store: ArtifactStore, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is put under a digest that is not its own."""
    path = tmp_path / "model"
    path.write_bytes(b"before")
    monkeypatch.setattr(files, "sweep", lambda _: path.write_bytes(b"after"))
    with pytest.raises(InvalidInput, match="changed while it was stored"):
        store.put(path, format="raw")
    assert [path for path in Path(root).rglob("*") if path.is_file()] == []


def test_a_folder_with_a_link_is_refused(store: ArtifactStore, root: str, tmp_path: Path) -> None:
    """Nothing of it is stored, least of all what the link leads to."""
    folder = model_folder(tmp_path)
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match="links are not followed"):
        store.put(folder, format="raw")
    assert not Path(root).exists()


def test_a_path_without_a_file_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    """A missing model and a pipe are the caller's mistakes."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe"):
        with pytest.raises(InvalidInput, match="no file or folder"):
            store.put(tmp_path / name, format="raw")


def test_a_model_that_cannot_be_read_is_the_callers_mistake(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permission that is missing on the model is not a problem of the store."""
    (tmp_path / "model").touch()

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InvalidInput, match="model cannot be read: Permission denied"):
        store.put(tmp_path / "model", format="raw")


def test_a_large_file_does_not_pass_through_memory(store: ArtifactStore, root: str, tmp_path: Path) -> None:
    """Storing and reading take a few pieces of memory, whatever the size."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    try:
        artifact = store.put(tmp_path / "large", format="raw")
        assert sum(map(len, store.read(artifact.key))) == 64 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


# -- drivers and what they say -----------------------------------------------------------------------------


@pytest.mark.aws
def test_a_large_file_goes_up_in_parts(s3_artifacts_url: servers.S3Artifacts, tmp_path: Path) -> None:
    """What is larger than a part arrives whole all the same."""
    store = ArtifactStore(s3_artifacts_url.url, **s3_artifacts_url.storage_options)
    (tmp_path / "large").write_bytes(os.urandom(1_000_003) * 40)
    artifact = store.put(tmp_path / "large", format="raw")
    assert files.digest_of(store.read(artifact.key)) == (artifact.sha256, artifact.size)
    store.close()


@pytest.mark.aws
def test_a_bucket_that_is_not_there_is_unavailable(s3_artifacts_url: servers.S3Artifacts) -> None:
    """Writing to it and asking for it fail, without a word about how it was asked."""
    store = ArtifactStore("s3://no-such-bucket/models", **s3_artifacts_url.storage_options)
    for call in (store.ping, lambda: put(store, b"x")):
        with pytest.raises(BackendUnavailable) as caught:
            call()
        assert str(caught.value).startswith("artifact store is unavailable: no place for ")
        assert s3_artifacts_url.storage_options["client_kwargs"]["endpoint_url"] not in str(caught.value)
    store.close()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PermissionError("AKIAEXAMPLE is not allowed"), "access to .* is denied"),
        (TimeoutError("http://user:secret@host"), "TimeoutError on"),
        (RuntimeError("http://user:secret@host"), "RuntimeError on"),
    ],
)
def test_what_a_driver_says_stays_in_the_cause(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, no_pauses: None, raised: Exception, said: str
) -> None:
    """Drivers put hosts and keys into their messages; ours have neither."""

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(store._fs, "open", fail)
    with pytest.raises(BackendUnavailable, match=said) as caught:
        content(store, MISSING)
    assert caught.value.__cause__ is raised
    assert "secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_a_missing_driver_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 takes an extra."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependency, match=r"modelserve\[aws\]"):
        ArtifactStore("s3://bucket/models")


@pytest.mark.parametrize("url", ["nonsense://x", "gs://bucket/models"])
def test_a_url_that_nothing_serves_is_a_mistake_in_the_configuration(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Neither an unknown scheme nor one whose driver is not here opens."""
    imported = builtins.__import__

    def without_gcsfs(name: str, *args: Any) -> Any:
        if name == "gcsfs":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_gcsfs)
    with pytest.raises(ConfigError, match="no fsspec driver serves"):
        ArtifactStore(url)


def test_a_store_says_where_it_is(root: str) -> None:
    """The text of a store has its place and none of its options."""
    assert repr(ArtifactStore(root)) == f"ArtifactStore('file://{root}')"
    assert "secret" not in repr(ArtifactStore("memory://models", secret="secret"))


def test_nothing_is_made_before_the_first_put(store: ArtifactStore, root: str) -> None:
    """A store that is only read, or asked, makes no folders."""
    store.ping()
    assert not Path(root).exists()
    put(store, b"x")
    shutil.rmtree(root)
    put(store, b"x")
    assert Path(root).exists()


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")
