"""What a model should have loaded, in the order of importance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelserve.serving.wanted import Plan, Wanted, identity, least_important, plan_of, rivals, wanted_of
from modelserve.types import DeploymentState, Role
from tests.serving.world import version

ROLES: list[Role] = ["canary", "shadow", "shadow", "shadow"]


def plan(numbers: list[int]) -> Plan:
    """Want the first of these in production, then a canary, then shadows."""
    roles: list[Role] = ["production", *ROLES]
    return plan_of(Wanted(role, version(number)) for role, number in zip(roles, numbers, strict=False))


PLANS = st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True).map(plan)


def state(number: int | None) -> DeploymentState:
    production = None if number is None else version(number)
    return DeploymentState(model_name="m", generation=1, production=production, previous=version(8))


def test_the_registry_wants_its_production_version() -> None:
    """The version before is kept while it is loaded, and never loaded for itself."""
    assert wanted_of(state(3)) == (Wanted("production", version(3)),)
    assert wanted_of(state(None)) == ()


def test_a_version_in_several_roles_is_wanted_once() -> None:
    """It is loaded for the most important of them."""
    wanted = [Wanted("production", version(1)), Wanted("canary", version(2)), Wanted("shadow", version(2))]
    assert list(plan_of(wanted).values()) == wanted[:2]


@given(PLANS, st.data())
def test_memory_is_left_for_what_matters_more_and_for_what_is_being_loaded(found: Plan, data: st.DataObject) -> None:
    """Every version that could still take memory is counted, each once; what is loaded shows in what is available."""
    order = list(found)
    loaded = data.draw(st.sets(st.sampled_from(order)))
    loading = data.draw(st.sets(st.sampled_from(order))) - loaded
    one = data.draw(st.sampled_from(order))
    counted = [identity(each.version) for each in rivals(found, one, loaded=loaded, loading=loading)]
    assert len(counted) == len(set(counted))
    for place, each in enumerate(order):
        matters_more = place < order.index(one)
        expected = each != one and each not in loaded and (matters_more or each in loading)
        assert (each in counted) == expected


@given(PLANS, st.data())
def test_the_least_important_goes_first_and_none_that_matters_more(found: Plan, data: st.DataObject) -> None:
    """What is freed for a version matters less than it, and nothing that matters less still could go."""
    order = list(found)
    among = data.draw(st.sets(st.sampled_from(order)))
    one = data.draw(st.sampled_from(order))
    victim = least_important(found, one, among)
    less = [each for each in order[order.index(one) + 1 :] if each in among]
    assert victim == (less[-1] if less else None)
