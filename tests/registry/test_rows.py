"""What a history says about the versions that rollbacks can reach."""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

from modelserve.registry.rows import standing
from modelserve.types import DeploymentEvent

Action = Literal["register", "promote", "rollback", "archive"]


def events(*steps: tuple[Action, str | None]) -> list[DeploymentEvent]:
    """Make events of pairs: what was done, and what was in production afterwards."""
    common: dict[str, Any] = {"model_name": "churn", "version": "-", "previous": None, "actor": "", "reason": ""}
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return [
        DeploymentEvent(**common, generation=number, action=action, production=production, occurred_at=moment)
        for number, (action, production) in enumerate(steps, 1)
    ]


def test_nothing_stands_before_the_first_promotion() -> None:
    """Registering and archiving put nothing into production."""
    assert standing(events(("register", None), ("archive", None))) == []


def test_promotions_pile_up_and_rollbacks_take_off() -> None:
    """A, B, C and one rollback leave A and B."""
    history = events(("promote", "A"), ("register", "A"), ("promote", "B"), ("promote", "C"), ("rollback", "B"))
    assert standing(history) == ["A", "B"]


def test_a_version_rolled_back_is_passed_over() -> None:
    """After A, B, back, C a rollback would lead to A: B was taken out for a reason."""
    history = events(("promote", "A"), ("promote", "B"), ("rollback", "A"), ("promote", "C"))
    assert standing(history) == ["A", "C"]


def test_a_version_promoted_again_stands_twice() -> None:
    """A, B, A leads back over B to A."""
    assert standing(events(("promote", "A"), ("promote", "B"), ("promote", "A"))) == ["A", "B", "A"]
