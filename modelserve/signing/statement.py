"""What is signed: everything in a version's row that decides what is loaded and run, as one sequence of bytes.

The row is not kept a second time inside the signature. Whoever verifies builds the statement anew from the row at
hand, so there is nothing that could be read in place of what was signed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from modelserve.types import Artifact, FrameworkName, Json, ModelVersion

_PURPOSE: Final = b"modelserve version 1\n"  # a signature made for anything else, or for a later form, never fits


def statement_of(version: ModelVersion) -> bytes:
    """Return the statement of a row."""
    return statement(
        model_name=version.model_name,
        version=version.version,
        framework=version.framework,
        artifact=version.artifact,
        signature=version.signature,
        load_options=version.load_options,
        example=version.example,
    )


def statement(
    *,
    model_name: str,
    version: str,
    framework: FrameworkName,
    artifact: Artifact,
    signature: Json,
    load_options: Mapping[str, Json],
    example: Artifact | None,
) -> bytes:
    """Return the canonical bytes of a version: equal for equal rows, whichever database they went through.

    After a line that says what they are for comes JSON in ASCII, without spaces, its keys in the order of their code
    points. A number that is whole is written as an integer, since databases give 1e22 back as one.
    """
    document = {
        "model_name": model_name,
        "version": version,
        "framework": framework,
        "artifact": _pinned(artifact),
        "signature": signature,
        "load_options": load_options,
        "example": None if example is None else _pinned(example),
    }
    text = json.dumps(_canonical(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _PURPOSE + text.encode("ascii")


def _pinned(artifact: Artifact) -> dict[str, Json]:
    return {"key": artifact.key, "sha256": artifact.sha256, "size": artifact.size, "format": artifact.format}


def _canonical(value: Any) -> Json:
    if isinstance(value, Mapping):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
