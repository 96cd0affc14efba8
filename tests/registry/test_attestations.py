"""Signatures in the registry, over SQLite and PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from modelserve.errors import InvalidInput, ModelNotFound, VersionNotFound
from modelserve.registry import Registry
from modelserve.signing import generate_keys, signing_key, trusted_keys, verify
from modelserve.types import ModelVersion

Insert: TypeAlias = Callable[..., ModelVersion]
PAIR, OTHER = generate_keys(), generate_keys()
TRUSTED = trusted_keys([PAIR.public])


def test_a_signature_is_kept_and_recorded(registry: Registry, insert: Insert) -> None:
    """Signing writes the attestation, raises the generation, gives a hint, and leaves status and pointers alone."""
    insert(registry, "churn", "1")
    registry.promote("churn", "1")
    hints: list[str | None] = []
    registry.subscribe(hints.append)

    signed = registry.sign("churn", "1", PAIR.private, actor="ann", reason="reviewed")

    assert signed == registry.get("churn", "1") == registry.production("churn")
    verify(TRUSTED, signed)
    event = registry.history("churn")[-1]
    assert (event.action, event.version, event.actor, event.reason) == ("sign", "1", "ann", "reviewed")
    assert (event.generation, event.production) == (3, "1")
    assert registry.deployment("churn").generation == 3
    assert hints == ["churn"]


def test_signing_again_changes_nothing(registry: Registry, insert: Insert) -> None:
    """The same key makes the same signature: there is no new generation and no event."""
    insert(registry, "churn", "1")
    first = registry.sign("churn", "1", PAIR.private)
    assert registry.sign("churn", "1", PAIR.private) == first
    assert registry.deployment("churn").generation == 2


def test_signatures_of_several_keys_are_kept_side_by_side(registry: Registry, insert: Insert) -> None:
    """A key is exchanged by signing with the new one before the old one is trusted no longer."""
    insert(registry, "churn", "1")
    registry.sign("churn", "1", PAIR.private)
    both = registry.sign("churn", "1", OTHER.private)
    verify(TRUSTED, both)
    verify(trusted_keys([OTHER.public]), both)


@pytest.mark.parametrize("value", [1e22, 1.0, 0.1, -0.0, 2**60, 1e-300, 'é\\"\n', None, True, [0.0, {"b": 1, "a": 2}]])
def test_a_signature_made_at_registration_fits_what_the_database_gives_back(
    registry: Registry, insert: Insert, value: Any
) -> None:
    """It is made of what is registered, not of what was stored; numbers and the order of keys come back otherwise."""
    insert(registry, "churn", "1", load_options={"z": value, "a": value}, signing_key=signing_key(PAIR.private))
    verify(TRUSTED, registry.get("churn", "1"))
    assert [event.action for event in registry.history("churn")] == ["register"]


def test_rollbacks_pass_over_signatures(registry: Registry, insert: Insert) -> None:
    """A signature is no promotion: what rollbacks can reach stays what it was."""
    for version in ("1", "2"):
        insert(registry, "churn", version)
        registry.promote("churn", version)
        registry.sign("churn", version, PAIR.private)
    assert registry.rollback("churn").version == "1"
    verify(TRUSTED, registry.production("churn"))


def test_what_cannot_be_signed_is_told(registry: Registry, insert: Insert) -> None:
    """Unknown models and versions are named, and a wrong key changes nothing."""
    insert(registry, "churn", "1")
    with pytest.raises(ModelNotFound):
        registry.sign("fraud", "1", PAIR.private)
    with pytest.raises(VersionNotFound):
        registry.sign("churn", "2", PAIR.private)
    with pytest.raises(InvalidInput, match="signing_key: is no private key"):
        registry.sign("churn", "1", PAIR.public)
    assert registry.get("churn", "1").attestation is None


def test_a_wrong_key_is_told_before_anything_is_saved(registry: Registry) -> None:
    """``register`` looks at the key first: no model is saved for nothing."""
    with pytest.raises(InvalidInput, match="signing_key"):
        registry.register("churn", "1", object(), signing_key="no key")
    assert registry.models() == []
