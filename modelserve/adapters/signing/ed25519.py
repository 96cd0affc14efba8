"""Ed25519 keys by ``cryptography``: PKCS #8 and SubjectPublicKeyInfo, in PEM."""

from __future__ import annotations

import hashlib
from typing import Any

from modelserve import plugins
from modelserve.errors import InvalidInput
from modelserve.ports import KeyPair

_ED25519 = "cryptography.hazmat.primitives.asymmetric.ed25519"


class Ed25519Keys:
    """The adapter of :class:`modelserve.ports.Keys`."""

    def __init__(self) -> None:
        self._serialization = plugins.require("cryptography.hazmat.primitives.serialization")
        self._ed25519 = plugins.require(_ED25519)

    def generate(self) -> KeyPair:
        """Make a new pair."""
        form = self._serialization
        key = self._ed25519.Ed25519PrivateKey.generate()
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        return KeyPair(private=private.decode(), public=public.decode())

    def signing_key(self, pem: bytes) -> PrivateKey:
        """Read a private key. Raises ``InvalidInput``."""
        try:
            key = self._serialization.load_pem_private_key(pem, password=None)
        except TypeError as error:
            problem = "the key is encrypted; give it decrypted: openssl pkey -in FILE -out DECRYPTED"
            raise InvalidInput("signing_key", problem) from error
        except Exception as error:
            raise InvalidInput("signing_key", "is no private key in PEM (PKCS #8)") from error
        if not isinstance(key, self._ed25519.Ed25519PrivateKey):
            raise InvalidInput("signing_key", "is a private key, but not for Ed25519; make one: modelserve keygen DIR")
        return PrivateKey(key, self._id_of(key.public_key()))

    def trusted_key(self, pem: bytes) -> PublicKey:
        """Read a public key. Raises ``InvalidInput``."""
        if b"PRIVATE KEY" in pem:
            raise InvalidInput("trusted_key", "is a private key; servers get the public one alone")
        if pem.count(b"-----BEGIN ") > 1:
            raise InvalidInput("trusted_key", "holds several keys; give each in a text or a file of its own")
        try:
            key = self._serialization.load_pem_public_key(pem)
        except Exception as error:
            raise InvalidInput("trusted_key", "is no public key in PEM (SubjectPublicKeyInfo)") from error
        if not isinstance(key, self._ed25519.Ed25519PublicKey):
            raise InvalidInput("trusted_key", "is a public key, but not for Ed25519")
        return PublicKey(key, self._id_of(key))

    def _id_of(self, public_key: Any) -> str:
        form = self._serialization
        der = public_key.public_bytes(form.Encoding.DER, form.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(der).hexdigest()


class PrivateKey:
    """An Ed25519 private key. It does not show itself."""

    def __init__(self, key: Any, key_id: str) -> None:
        self._key = key
        self.key_id = key_id

    def sign(self, message: bytes) -> bytes:
        """Return the signature: 64 bytes."""
        signature: bytes = self._key.sign(message)
        return signature


class PublicKey:
    """An Ed25519 public key."""

    def __init__(self, key: Any, key_id: str) -> None:
        self._key = key
        self.key_id = key_id

    def accepts(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature was made of this message by the private key that belongs to this one."""
        invalid = plugins.require("cryptography.exceptions").InvalidSignature
        try:
            self._key.verify(signature, message)
        except invalid:
            return False
        return True
