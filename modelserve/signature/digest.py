"""What stands for one input to one version: the key of a cached prediction, the fingerprint of a row."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Final, TypeVar

from modelserve.types import ModelVersion

T = TypeVar("T")

PREFIX: Final = b"mi1\0"


def input_digest(
    meta: ModelVersion, canonical: Callable[[T], bytes], *, key: bytes | None = None
) -> Callable[[T], bytes]:
    r"""Return what gives the digest, 32 bytes, of an input of this version: of a row, with ``Signature.canonical``.

    It is the SHA-256 over ``b"mi1\0"``, then the model's name, the version and the artifact's SHA-256 in hex, each as a
    little-endian u32 length and UTF-8 bytes, then the canonical bytes. What differs in any of these has
    another digest: no two models, versions or inputs share one. With a ``key`` it is the HMAC-SHA-256 over the same
    bytes (RFC 2104): who has not the key cannot find an input by trying what it might have been.
    """
    beginning = hashlib.sha256(PREFIX) if key is None else hmac.new(key, PREFIX, hashlib.sha256)
    for text in (meta.model_name, meta.version, meta.artifact.sha256):
        beginning.update(struct.pack("<I", len(text.encode())) + text.encode())
    begin = beginning.copy

    def digest(value: T) -> bytes:
        hashed = begin()
        hashed.update(canonical(value))
        return hashed.digest()

    return digest
