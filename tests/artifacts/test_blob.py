"""Keys and manifests: what is accepted, and all that is not."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.artifacts import blob
from modelserve.errors import ArtifactCorrupt, InvalidInput, LoadFailed
from modelserve.types import Artifact
from tests.artifacts.conftest import model_folder

DIGEST = "0123456789abcdef" * 4

names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1)
paths = st.lists(names.filter(lambda name: name not in {".", ".."}), min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize("kind", ["blobs", "manifests"])
def test_the_two_patterns_are_keys(kind: str) -> None:
    """Files and folders have keys that end with their digest."""
    assert blob.digest_in(f"{kind}/sha256/{DIGEST}") == DIGEST


@pytest.mark.parametrize(
    "key",
    [
        "",
        DIGEST,
        f"blobs/sha256/{DIGEST}\n",
        f"blobs/sha256/{DIGEST.upper()}",
        f"blobs/sha256/{DIGEST[:-1]}",
        f"blobs/sha256/{DIGEST}/../../etc",
        f"blobs/sha256/../{DIGEST}",
        f"/blobs/sha256/{DIGEST}",
        f"../blobs/sha256/{DIGEST}",
        f"blobs//sha256/{DIGEST}",
        f"blobs/md5/{DIGEST}",
        f"trees/sha256/{DIGEST}",
        "blobs/sha256/" + "\N{ARABIC-INDIC DIGIT ZERO}" * 64,
    ],
)
def test_nothing_else_is_a_key(key: str) -> None:
    """A path is never made from anything but the two patterns."""
    with pytest.raises(LoadFailed, match="no artifact key"):
        blob.digest_in(key)


@given(st.text())
def test_no_text_slips_through(text: str) -> None:
    """Whatever a key may be, it has no way up and no way out."""
    if blob.is_key(text):
        assert text.count("/") == 2
        assert ".." not in text


def test_a_key_of_other_bytes_is_refused() -> None:
    """The registered digest and the one in the key have to be the same."""
    artifact = Artifact(key=blob.blob_key(DIGEST), sha256="f" * 64, size=1, format="raw")
    with pytest.raises(ArtifactCorrupt) as caught:
        blob.key_of(artifact)
    assert (caught.value.expected, caught.value.found) == ("f" * 64, DIGEST)


def test_a_folder_has_one_manifest(tmp_path: Path) -> None:
    """The bytes of a manifest are those of the sorted files, whatever order the disk has them in."""
    entries = blob.entries_of(model_folder(tmp_path))
    assert [entry.path for entry in entries] == ["saved_model.pb", "variables.index", "variables/data"]
    assert [entry.size for entry in entries] == [5, 0, 7000]
    data = blob.encode_manifest(entries)
    assert orjson.loads(data)[0].keys() == {"path", "sha256", "size"}
    assert orjson.dumps(orjson.loads(data), option=orjson.OPT_SORT_KEYS) == data


@given(st.lists(paths, min_size=1, max_size=5))
def test_a_manifest_reads_back(found: list[str]) -> None:
    """What is written is read; where one path would have to be a file and a folder, nothing is."""
    entries = [blob.Entry(path, DIGEST, 7) for path in found]
    clash = any(a == b or b.startswith(f"{a}/") for i, a in enumerate(found) for j, b in enumerate(found) if i != j)
    if clash:
        with pytest.raises(LoadFailed, match="twice"):
            blob.decode_manifest(blob.encode_manifest(entries))
    else:
        assert blob.decode_manifest(blob.encode_manifest(entries)) == entries


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../x", "a/..", "/etc/passwd", "//x", "", ".", "./a", "a//b", "a/", "a\0b", "a\nb", "..\\x", "C:\\x"],
)
def test_a_hostile_path_is_refused(path: str) -> None:
    """No manifest reaches outside its folder."""
    with pytest.raises(LoadFailed, match="no path inside it"):
        blob.decode_manifest(orjson.dumps([{"path": path, "sha256": DIGEST, "size": 1}]))


@pytest.mark.parametrize("found", [["a", "a"], ["a", "a/b"], ["a/b/c", "a"]])
def test_a_path_named_twice_is_refused(found: list[str]) -> None:
    """A file cannot be two files, or a folder as well."""
    with pytest.raises(LoadFailed, match="twice"):
        blob.decode_manifest(orjson.dumps([{"path": path, "sha256": DIGEST, "size": 1} for path in found]))


@pytest.mark.parametrize("digest", ["../../../etc/passwd", DIGEST.upper(), f"{DIGEST}\n", DIGEST[1:]])
def test_a_hostile_digest_is_refused(digest: str) -> None:
    """A digest in a manifest is 64 lower-case hexadecimal digits."""
    with pytest.raises(LoadFailed, match="no digest"):
        blob.decode_manifest(orjson.dumps([{"path": "a", "sha256": digest, "size": 1}]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[",
        b"7",
        b"null",
        b'{"path": "a"}',
        b"[1]",
        b'["a"]',
        b'[{"path": "a"}]',
        b'[{"path": 1, "sha256": "a", "size": 1}]',
        b'[{"path": "a", "sha256": "a", "size": -1}]',
        b'[{"path": "a", "sha256": "a", "size": true}]',
        b'[{"path": "a", "sha256": "a", "size": 1, "mode": 4095}]',
        b"\xff\xfe",
    ],
)
def test_a_malformed_manifest_is_refused(data: bytes) -> None:
    """What is not a list of path, digest and size cannot be read."""
    with pytest.raises(LoadFailed, match="cannot be read"):
        blob.decode_manifest(data)


@pytest.mark.parametrize("target", ["saved_model.pb", "variables", "nowhere", "/etc/passwd"])
def test_links_are_not_followed(tmp_path: Path, target: str) -> None:
    """A folder with a link in it is refused, wherever the link leads."""
    folder = model_folder(tmp_path)
    (folder / "link").symlink_to(target)
    with pytest.raises(InvalidInput, match="links are not followed"):
        blob.entries_of(folder)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Pipes and devices have no bytes to keep."""
    folder = model_folder(tmp_path)
    os.mkfifo(folder / "variables" / "pipe")
    with pytest.raises(InvalidInput, match="not a plain file"):
        blob.entries_of(folder)


@pytest.mark.parametrize("name", ["new\nline", "back\\slash"])
def test_a_name_that_no_manifest_may_have_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """What could not be loaded is not stored either."""
    folder = model_folder(tmp_path)
    (folder / name).touch()
    with pytest.raises(InvalidInput, match="no portable file name"):
        blob.entries_of(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """A folder without a file is no model."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="holds no file"):
        blob.entries_of(tmp_path / "model")
