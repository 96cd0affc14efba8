"""A file of an artifact, read whole: what is hashed and what is loaded are the same bytes in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modelserve.errors import ArtifactCorrupt


def contents(path: Path, sha256: str | None = None) -> bytes:
    """Return the bytes of a file. Raises ``ArtifactCorrupt`` unless they hash to ``sha256``, where that is known."""
    data = path.read_bytes()
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ArtifactCorrupt(path.name, sha256, found)
    return data
