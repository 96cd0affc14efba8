"""Keys from text, from files and from elsewhere."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from modelserve.errors import ConfigError, InvalidInput, MissingDependency
from modelserve.signing import create_key_files, generate_keys, signing_key, trusted_keys

PAIR = generate_keys()


def _private(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> str:
    encryption = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, encryption).decode()


def _public(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()


def test_keys_are_read_from_text_and_from_files(tmp_path: Path) -> None:
    """A pair has one id, from whichever form it is read."""
    private, public = create_key_files(tmp_path / "keys")
    keys = [signing_key(private), signing_key(str(private)), signing_key(private.read_text())]
    keys += trusted_keys([public, str(public), public.read_text()])  # type: ignore[arg-type]  # only their ids are read
    assert len({key.key_id for key in keys}) == 1
    assert len(keys[0].key_id) == 64


def test_an_object_that_signs_is_taken_as_it_is() -> None:
    """A key that never leaves its device is given as what signs with it."""
    key = signing_key(PAIR.private)
    assert signing_key(key) is key
    trusted = trusted_keys([PAIR.public])[0]
    assert trusted_keys([trusted]) == (trusted,)
    assert trusted.accepts(b"message", key.sign(b"message"))
    assert not trusted.accepts(b"another", key.sign(b"message"))


def test_the_private_file_is_its_owners_alone_and_nothing_is_overwritten(tmp_path: Path) -> None:
    """Keys that are there already stay what they are."""
    private, public = create_key_files(tmp_path / "deep" / "keys")
    assert private.stat().st_mode & 0o777 == 0o600
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(InvalidInput, match="never overwritten"):
        create_key_files(private.parent)
    public.unlink()
    with pytest.raises(InvalidInput, match="never overwritten"):
        create_key_files(private.parent)
    assert private.read_bytes() == before[0]
    assert not public.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written here"):
        create_key_files(tmp_path / "file")


def test_keys_that_other_tools_wrote_are_taken(tmp_path: Path) -> None:
    """The form is a standard: PKCS #8 and SubjectPublicKeyInfo in PEM."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    key = ed25519.Ed25519PrivateKey.generate()
    private.write_text(_private(key))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    assert signing_key(private).key_id == trusted_keys([public])[0].key_id


CURVE = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (PAIR.public, "is no private key"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is no private key"),
        ("-----BEGIN \ud800", "is no private key"),
        (_private(CURVE), "not for Ed25519; make one: modelserve keygen"),
        (_private(ed25519.Ed25519PrivateKey.generate(), b"secret"), "is encrypted; give it decrypted: openssl"),
        (Path("nowhere.pem"), "the file nowhere.pem cannot be read"),
        ("nowhere.pem", "what is given cannot be read as a file, and is no PEM text"),
        ("nul\0byte", "what is given cannot be read as a file, and is no PEM text"),
    ],
)
def test_what_is_no_private_key_is_refused(key: str | Path, problem: str) -> None:
    """The error says what is wrong, and never repeats a text that may be a key."""
    with pytest.raises(InvalidInput, match=problem) as refused:
        signing_key(key)
    assert refused.value.field == "signing_key"
    assert "AAAA" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (PAIR.private, "is a private key; servers get the public one alone"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is no public key"),
        (_public(CURVE), "not for Ed25519"),
        (PAIR.public + generate_keys().public, "holds several keys; give each in a text or a file of its own"),
        (Path("nowhere.pem"), "the file nowhere.pem cannot be read"),
    ],
)
def test_what_is_no_public_key_is_a_wrong_configuration(key: str | Path, problem: str) -> None:
    """The error names the key at fault by its place in the list."""
    with pytest.raises(ConfigError, match=rf"trusted_keys\[1\]: .*{problem}"):
        trusted_keys([PAIR.public, key])


def test_a_private_key_shows_in_no_error_and_no_repr() -> None:
    """A text that is no key is repeated neither in the message nor in its cause, and a pair does not print itself."""
    body = "MC4CAQAwBQYDK2VwBCIEIKsecretsecretsecret"
    with pytest.raises(InvalidInput) as refused:
        signing_key(body)
    shown = "".join(traceback.format_exception(refused.value))
    assert "secretsecret" not in shown
    assert "PRIVATE" not in repr(generate_keys())


def test_one_key_in_place_of_a_list_is_refused() -> None:
    """A text is a sequence of characters too, none of which is a key."""
    with pytest.raises(ConfigError, match=r"expected a list of keys.*\[key\]"):
        trusted_keys(PAIR.public)


def test_without_cryptography_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signing and verifying need an extra; nothing else does."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for use in (lambda: signing_key(PAIR.private), lambda: trusted_keys([PAIR.public]), generate_keys):
        with pytest.raises(MissingDependency, match=r"pip install 'modelserve\[signing\]'"):
            use()
    assert trusted_keys([]) == ()


def test_serving_without_signatures_imports_no_cryptography() -> None:
    """Who does not sign does not pay for it."""
    code = (
        "import sys, modelserve as ms; ms.ModelServer(ms.Registry('sqlite://')); print('cryptography' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"
