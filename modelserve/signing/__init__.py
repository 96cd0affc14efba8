"""Signatures of versions: who vouches for what a row of the registry says, beyond the digests that the row holds.

``statement`` is what is signed, ``attestation`` the signatures that a row carries, ``keys`` where keys come from.
"""

from __future__ import annotations

from modelserve.signing.attestation import signed, verify, with_signature
from modelserve.signing.keys import create_key_files, generate_keys, signing_key, trusted_keys
from modelserve.signing.statement import statement, statement_of

__all__ = [
    "create_key_files",
    "generate_keys",
    "signed",
    "signing_key",
    "statement",
    "statement_of",
    "trusted_keys",
    "verify",
    "with_signature",
]
