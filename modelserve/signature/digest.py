"""What stands for one input to one version: the key of a cached prediction, the fingerprint of a row."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Final

from modelserve.signature.signature import Signature
from modelserve.types import ModelVersion, Row

PREFIX: Final = b"mi1\0"


def input_digest(meta: ModelVersion, signature: Signature) -> Callable[[Row], bytes]:
    r"""Return what gives the digest, 32 bytes, of a validated row as the input of this version.

    It is the SHA-256 over ``b"mi1\0"``, then the model's name, the version and the artifact's SHA-256 in hex, each as a
    little-endian u32 length and UTF-8 bytes, then :meth:`Signature.canonical`. What differs in any of these has
    another digest: no two models, versions or inputs share one.
    """
    beginning = hashlib.sha256(PREFIX)
    for text in (meta.model_name, meta.version, meta.artifact.sha256):
        beginning.update(struct.pack("<I", len(text.encode())) + text.encode())
    begin, canonical = beginning.copy, signature.canonical

    def digest(row: Row) -> bytes:
        hashed = begin()
        hashed.update(canonical(row))
        return hashed.digest()

    return digest
