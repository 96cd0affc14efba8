"""What a model should have loaded: versions with their roles, in the order of their importance."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from modelserve.types import DeploymentState, ModelVersion, Role

Identity: TypeAlias = tuple[int, str, str, dt.datetime]
Plan: TypeAlias = Mapping[Identity, "Wanted"]
"""Each version that is wanted, once, the most important first."""


class Wanted(NamedTuple):
    """A version and what it is wanted for."""

    role: Role
    version: ModelVersion


WantedOf: TypeAlias = Callable[[DeploymentState], Sequence[Wanted]]


def wanted_of(state: DeploymentState) -> Sequence[Wanted]:
    """Return what a model should have loaded: production first, then the canary, then shadows."""
    return () if state.production is None else (Wanted("production", state.production),)


def identity(version: ModelVersion) -> Identity:
    """Return what distinguishes a version from any other, also from one that has its id in another database."""
    return version.id, version.version, version.artifact.sha256, version.created_at


def plan_of(wanted: Iterable[Wanted]) -> Plan:
    """Return each version once: one that is wanted in several roles is loaded for the most important of them."""
    plan: dict[Identity, Wanted] = {}
    for each in wanted:
        plan.setdefault(identity(each.version), each)
    return plan


def rivals(plan: Plan, one: Identity, *, loaded: Container[Identity], loading: Container[Identity]) -> list[Wanted]:
    """Return the versions that one has to leave memory for, because it does not show yet that they have it.

    Those are all that matter more and are not loaded, and those that matter less and are being loaded.
    """
    place = list(plan).index(one)
    more, less = list(plan)[:place], list(plan)[place + 1 :]
    missing = [each for each in more if each not in loaded]
    return [plan[each] for each in (*missing, *(each for each in less if each in loading))]


def least_important(plan: Plan, after: Identity, among: Container[Identity]) -> Identity | None:
    """Return the least important version of some, if it matters less than the one given."""
    less = list(plan)[list(plan).index(after) + 1 :]
    return next((each for each in reversed(less) if each in among), None)
