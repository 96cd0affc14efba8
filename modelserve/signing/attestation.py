"""The signatures that a version carries: one line of text each, ``ed25519 <key id> <signature>``.

A key has one line at most, and keys do not displace each other: while keys are exchanged, a version bears a
signature by the old key for the servers that trust that one still, and by the new one for the others.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Final

from modelserve.errors import ArtifactUnsafe
from modelserve.ports import SigningKey, TrustedKey
from modelserve.signing.statement import statement_of
from modelserve.types import ModelVersion

_LINE: Final = re.compile(r"ed25519 ([0-9a-f]{64}) ([A-Za-z0-9+/]{86}==)")
_SHOWN: Final = 16  # hex digits of a key's id: enough for people to tell keys apart


def signed(key: SigningKey, statement: bytes) -> str:
    """Return the line of a statement's signature by ``key``."""
    return f"ed25519 {key.key_id} {base64.b64encode(key.sign(statement)).decode()}"


def with_signature(attestation: str | None, line: str) -> str:
    """Return an attestation that has this line in place of an earlier one by the same key.

    Lines that nobody can read are dropped: signing again is how a damaged attestation is repaired.
    """
    lines = {match[1]: match[0] for text in (attestation or "").splitlines() if (match := _LINE.fullmatch(text))}
    lines[line.split(" ")[1]] = line
    return "\n".join(lines[key_id] for key_id in sorted(lines))


def verify(trusted: Sequence[TrustedKey], version: ModelVersion) -> None:
    """Return if one of the trusted keys signed exactly what the row says. Raises ``ArtifactUnsafe`` otherwise."""
    name = f"{version.model_name} {version.version}"
    if not version.attestation:
        raise ArtifactUnsafe(
            f"{name} is not signed, and a signature is required here; if it is as it should be, sign it: "
            f"modelserve sign {name} --key FILE"
        )
    signatures = _signatures(name, version.attestation)
    known = [key for key in trusted if key.key_id in signatures]
    if not known:
        raise ArtifactUnsafe(f"{name} is signed by keys that are not trusted here: {_shown(signatures)}")
    message = statement_of(version)
    if not any(key.accepts(message, signatures[key.key_id]) for key in known):
        raise ArtifactUnsafe(
            f"{name} is not what was signed by {_shown([key.key_id for key in known])}: its row in the registry was "
            "changed afterwards, or its signature was; register it again as a new version"
        )


def _signatures(name: str, attestation: str) -> dict[str, bytes]:
    found = [_LINE.fullmatch(line) for line in attestation.splitlines()]
    if not all(found):
        raise ArtifactUnsafe(f"the attestation of {name} is malformed; sign it again")
    return {match[1]: base64.b64decode(match[2]) for match in found if match}


def _shown(key_ids: Sequence[str] | dict[str, bytes]) -> str:
    return ", ".join(key_id[:_SHOWN] for key_id in key_ids)
