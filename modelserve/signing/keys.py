"""Where keys come from: PEM text, files that hold it, or an object that signs by other means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from modelserve import plugins
from modelserve.errors import ConfigError, InvalidInput
from modelserve.ports import KeyPair, SigningKey, TrustedKey

PRIVATE_FILE: Final = "private.pem"
PUBLIC_FILE: Final = "public.pem"
_PEM: Final = "-----BEGIN"


def signing_key(key: str | Path | SigningKey) -> SigningKey:
    """Return what signs: an Ed25519 private key from PEM text (PKCS #8) or the file that holds it.

    An object that satisfies :class:`modelserve.ports.SigningKey` is taken as it is, for keys that never leave their
    device. Raises ``InvalidInput`` for what is no such key, and ``MissingDependency`` without ``cryptography``.
    """
    if not isinstance(key, str | Path):
        return key
    return plugins.keys().signing_key(_pem(key, "signing_key"))


def trusted_keys(keys: Sequence[str | Path | TrustedKey]) -> tuple[TrustedKey, ...]:
    """Return what verifies: Ed25519 public keys from PEM texts (SubjectPublicKeyInfo) or the files that hold them.

    Raises ``ConfigError`` that names the one at fault, and ``MissingDependency`` without ``cryptography``.
    """
    if isinstance(keys, str | Path):
        raise ConfigError("trusted_keys: expected a list of keys, got one; write [key]")
    return tuple(_trusted_key(key, f"trusted_keys[{i}]") for i, key in enumerate(keys))


def generate_keys() -> KeyPair:
    """Return a new pair of keys, as PEM text."""
    return plugins.keys().generate()


def create_key_files(folder: Path) -> tuple[Path, Path]:
    """Write a new pair of keys into a folder; return the files of the private and of the public one.

    The private one is readable by its owner alone. Raises ``InvalidInput`` where one of the files is there already.
    """
    private, public = folder / PRIVATE_FILE, folder / PUBLIC_FILE
    pair = generate_keys()
    try:
        for path in (private, public):
            if path.exists():
                raise InvalidInput(str(path), "is there already, and a key is never overwritten; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(private, pair.private, 0o600)
        _write_new(public, pair.public, 0o644)
    except OSError as error:
        raise InvalidInput(str(folder), f"keys cannot be written here: {error.strerror}") from error
    return private, public


def _trusted_key(key: str | Path | TrustedKey, field: str) -> TrustedKey:
    if not isinstance(key, str | Path):
        return key
    try:
        return plugins.keys().trusted_key(_pem(key, field))
    except InvalidInput as error:
        raise ConfigError(f"{field}: {error.problem}") from error


def _pem(key: str | Path, field: str) -> bytes:
    if isinstance(key, str) and _PEM in key:
        return key.encode(errors="replace")
    try:
        return Path(key).read_bytes()
    except (OSError, ValueError):
        # A text is not repeated, in the cause neither: it may be a key that lost its first line.
        named = f"the file {key}" if isinstance(key, Path) else "what is given"
        raise InvalidInput(field, f"{named} cannot be read as a file, and is no PEM text") from None


def _write_new(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as stream:
        stream.write(text)
