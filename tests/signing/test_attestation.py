"""Signatures of a version, and what a row is refused for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from modelserve.errors import ArtifactUnsafe
from modelserve.ports import KeyPair
from modelserve.signing import generate_keys, signed, signing_key, statement_of, trusted_keys, verify, with_signature
from modelserve.types import ModelVersion
from tests.signing.rows import CHANGES, VERSION

OURS, NEXT, THEIRS = generate_keys(), generate_keys(), generate_keys()


def by(*pairs: KeyPair, version: ModelVersion = VERSION) -> ModelVersion:
    """Return the version with a signature by each of the keys."""
    attestation = version.attestation
    for pair in pairs:
        attestation = with_signature(attestation, signed(signing_key(pair.private), statement_of(version)))
    return dataclasses.replace(version, attestation=attestation)


def accepted(version: ModelVersion, trusted: Sequence[KeyPair] = (OURS,)) -> None:
    verify(trusted_keys([pair.public for pair in trusted]), version)


def test_what_a_trusted_key_signed_is_accepted() -> None:
    """A signature fits the row that it was made of, and goes on to fit it once the version is promoted."""
    accepted(by(OURS))
    accepted(dataclasses.replace(by(OURS), status="production", metrics={}))


@pytest.mark.promise("P8")
@pytest.mark.parametrize("attestation", [None, ""])
def test_an_unsigned_version_is_refused(attestation: str | None) -> None:
    """The error says how to sign it."""
    with pytest.raises(ArtifactUnsafe, match=r"churn 1.4.2 is not signed.*modelserve sign churn 1.4.2"):
        accepted(dataclasses.replace(VERSION, attestation=attestation))


@pytest.mark.promise("P8")
def test_a_signature_by_another_key_is_refused() -> None:
    """Whoever can write to the registry can sign, but not with a key that is trusted."""
    stranger = trusted_keys([THEIRS.public])[0].key_id
    with pytest.raises(ArtifactUnsafe, match=f"not trusted here: {stranger[:16]}$"):
        accepted(by(THEIRS))


@pytest.mark.promise("P8")
def test_a_signature_under_the_id_of_a_trusted_key_must_be_by_that_key() -> None:
    """The id beside a signature is only a hint: it is the signature that counts."""
    ours, theirs = (trusted_keys([pair.public])[0].key_id for pair in (OURS, THEIRS))
    forged = dataclasses.replace(VERSION, attestation=str(by(THEIRS).attestation).replace(theirs, ours))
    with pytest.raises(ArtifactUnsafe, match="is not what was signed"):
        accepted(forged)


@pytest.mark.promise("P8")
@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_was_changed_after_it_was_signed_is_refused(change: str) -> None:
    """No field that decides what is loaded can be swapped under a signature."""
    with pytest.raises(ArtifactUnsafe, match="is not what was signed"):
        accepted(CHANGES[change](by(OURS)))


def test_the_signature_of_one_version_is_none_of_another() -> None:
    """A signature cannot be moved to another row."""
    other = dataclasses.replace(VERSION, version="9.9.9", attestation=by(OURS).attestation)
    with pytest.raises(ArtifactUnsafe, match="is not what was signed"):
        accepted(other)


@pytest.mark.parametrize(
    "attestation",
    [
        "nonsense",
        "ed25519 ab cd",
        "rsa" + str(by(OURS).attestation).removeprefix("ed25519"),
        f"{by(OURS).attestation}\n\n",
        f"{by(OURS).attestation} ",
        f"{by(OURS).attestation}\nnonsense",
    ],
)
def test_a_malformed_attestation_is_refused_and_repaired_by_signing_again(attestation: str) -> None:
    """What is not a list of signatures is not searched for one that might do."""
    damaged = dataclasses.replace(VERSION, attestation=attestation)
    with pytest.raises(ArtifactUnsafe, match="malformed; sign it again"):
        accepted(damaged)
    accepted(by(OURS, version=damaged))


def test_keys_are_exchanged_without_a_gap() -> None:
    """A version signed by the old and the new key is accepted by servers that trust one of them, or both."""
    both = by(OURS, NEXT)
    for trusted in ([OURS], [NEXT], [OURS, NEXT], [NEXT, OURS]):
        accepted(both, trusted)
    accepted(by(OURS), [NEXT, OURS])
    accepted(by(NEXT), [NEXT, OURS])


def test_one_good_signature_is_enough() -> None:
    """A signature that went bad beside a good one does not take the version out of service."""
    stale = by(NEXT, version=dataclasses.replace(VERSION, framework="onnx")).attestation
    accepted(by(OURS, version=dataclasses.replace(VERSION, attestation=stale)), [NEXT, OURS])


def test_a_key_signs_once() -> None:
    """Signing again with the same key changes nothing, whatever the order of keys."""
    assert by(OURS, NEXT, OURS).attestation == by(NEXT, OURS).attestation
    assert str(by(OURS, NEXT, OURS).attestation).count("ed25519") == 2
