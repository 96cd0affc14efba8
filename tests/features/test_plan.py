"""A request and what was read for it, put together: which value, which status, which error."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.errors import BackendUnavailable, InvalidInput, LoadFailed
from modelserve.features.declaration import Features
from modelserve.features.plan import Completed, FeaturePlan, plan_of
from modelserve.ports import FeatureKey, FeatureRow, NoValue
from modelserve.signature import Field, Signature

NOW = 1_700_000_000.0
SIGNATURE = Signature(
    [
        Field("spend", "float64"),
        Field("age", "int64"),
        Field("price", "float32"),
        Field("plan", "string", (), nullable=True),
        Field("visits", "int64"),
    ]
)
USER = Features("user_id", ["visits", "spend", "plan"], defaults={"visits": 0, "plan": "none"}, max_age_s=60)
ITEM = Features("item_id", ["price"], defaults={"price": 9.5})


@pytest.fixture
def plan() -> FeaturePlan:
    """The plan of a model with two entities and one input of its own."""
    return FeaturePlan("m", SIGNATURE, [USER, ITEM])


def user(*values: Any, age_s: float | None = 1.0) -> FeatureRow:
    return FeatureRow(values, None if age_s is None else NOW - age_s)


def item(value: Any) -> FeatureRow:
    return FeatureRow((value,), NOW)


def complete(plan: FeaturePlan, inputs: Any, *found: Any) -> Completed:
    return plan.complete(plan.validate(inputs), found, NOW)


REQUEST = {"age": 30, "user_id": 7, "item_id": "i1"}


def test_a_request_asks_for_one_row_per_entity(plan: FeaturePlan) -> None:
    """The keys are text, and the features of a row are asked for together."""
    assert plan.validate(REQUEST).wanted == (
        FeatureKey("user_id", "7", ("visits", "spend", "plan")),
        FeatureKey("item_id", "i1", ("price",)),
    )


def test_values_come_in_the_order_of_the_signature(plan: FeaturePlan) -> None:
    """Own inputs and features of all entities make one row, as if the request had given all of it."""
    found = complete(plan, REQUEST, user(3, 12.5, "pro"), item(4))
    assert found == Completed((12.5, 30, 4, "pro", 3), (), {"present": 4})
    assert SIGNATURE.validate({"spend": 12.5, "age": 30, "price": 4, "plan": "pro", "visits": 3}) == found.row


def test_declarations_of_one_group_share_a_row() -> None:
    """Features of one entity may have ages and defaults of their own, and still are one read."""
    plan = FeaturePlan(
        "m",
        Signature([Field("a", "float64"), Field("b", "float64"), Field("c", "float64")]),
        [
            Features("u", ["a"], max_age_s=10, defaults={"a": -1}),
            Features("u", ["b"], budget_ms=20),
            Features("u", ["c"], group="other"),
        ],
    )
    assert plan.validate({"u": 1}).wanted == (FeatureKey("u", "1", ("a", "b")), FeatureKey("other", "1", ("c",)))
    assert plan.budget_s == 0.02
    found = complete(plan, {"u": 1}, FeatureRow((1.0, 2.0), NOW - 11), FeatureRow((3.0,), None))
    assert found == Completed((-1, 2.0, 3.0), ("a",), {"stale": 1, "present": 2})


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (user(NoValue.MISSING, 1.0, "x"), "missing"),
        (user(NoValue.UNREADABLE, 1.0, "x"), "error"),
        (user(None, 1.0, "x"), "null"),
        (user("three", 1.0, "x"), "error"),
        (user(1.5, 1.0, "x"), "error"),
        (user(10**30, 1.0, "x"), "error"),
    ],
)
def test_a_value_that_is_no_good_gets_its_default(plan: FeaturePlan, row: FeatureRow, status: str) -> None:
    """The status says why, the answer says which, and the other features keep their values."""
    found = complete(plan, REQUEST, row, item(4.0))
    assert found.row == (1.0, 30, 4.0, "x", 0)
    assert found.degraded == ("visits",)
    assert found.statuses == {status: 1, "present": 3}
    assert found.refusal is None


@pytest.mark.parametrize("unread", ["timeout", "error"])
def test_a_row_that_was_not_read_gives_defaults(plan: FeaturePlan, unread: Any) -> None:
    """Each of its features has the status of the row."""
    found = complete(plan, REQUEST, user(3, 12.5, "pro"), unread)
    assert (found.row[2], found.degraded, found.statuses) == (9.5, ("price",), {"present": 3, unread: 1})


@pytest.mark.parametrize("age_s", [61.0, 1e9, -1e9, None])
def test_what_is_too_old_is_stale(plan: FeaturePlan, age_s: float | None) -> None:
    """A row older than its age limit counts for nothing, nor does one that tells no time, or one that is far ahead."""
    found = complete(plan, REQUEST, user(3, 12.5, "pro", age_s=age_s), item(4.0))
    assert found.statuses == {"stale": 3, "present": 1}
    assert isinstance(found.refusal, BackendUnavailable)
    assert "spend is older than 60 s" in str(found.refusal)


@pytest.mark.parametrize("age_s", [60.0, 0.0, -5.0])
def test_what_is_young_enough_is_not(plan: FeaturePlan, age_s: float) -> None:
    """At its limit a row is good, and so is one that a clock ahead of ours has written."""
    assert complete(plan, REQUEST, user(3, 12.5, "pro", age_s=age_s), item(4.0)).statuses == {"present": 4}


def test_null_is_a_value_where_the_model_takes_it(plan: FeaturePlan) -> None:
    """A null that the model was trained on is used, not replaced, and degrades nothing."""
    found = complete(plan, REQUEST, user(3, 12.5, None), item(4.0))
    assert found == Completed((12.5, 30, 4.0, None, 3), (), {"present": 3, "null": 1})


@pytest.mark.parametrize(
    ("row", "kind", "field"),
    [
        (user(3, NoValue.MISSING, "pro"), InvalidInput, "user_id"),
        (user(3, None, "pro"), InvalidInput, "user_id"),
        (user(3, NoValue.UNREADABLE, "pro"), BackendUnavailable, None),
        ("timeout", BackendUnavailable, None),
        ("error", BackendUnavailable, None),
    ],
)
def test_a_required_feature_is_an_error(plan: FeaturePlan, row: Any, kind: type[Exception], field: str | None) -> None:
    """What the store does not have is the key's fault; what it did not give is the store's, and may pass."""
    refusal = complete(plan, REQUEST, row, item(4.0)).refusal
    assert type(refusal) is kind
    assert "spend" in str(refusal)
    assert getattr(refusal, "field", None) == field


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"age": 30, "item_id": 1}, "user_id"),
        ({"age": 30, "user_id": None, "item_id": 1}, "user_id"),
        ({"age": 30, "user_id": 1.5, "item_id": 1}, "user_id"),
        ({"user_id": 1, "item_id": 1}, "age"),
        ({"age": "x", "user_id": 1, "item_id": 1}, "age"),
        ({"age": 30, "user_id": 1, "item_id": 1, "colour": 2}, "colour"),
        ({"age": 30, "user_id": 1, "item_id": 1, "spend": 2.0}, "spend"),
        ([1], ""),
        (None, ""),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_name(plan: FeaturePlan, inputs: Any, field: str) -> None:
    """Keys and own inputs are needed, and nothing else is taken: not a feature either."""
    with pytest.raises(InvalidInput) as refused:
        plan.validate(inputs)
    assert refused.value.field == field


def test_a_request_may_give_what_is_overridable() -> None:
    """What it gives wins over the store; a key is not needed where nothing is read by it."""
    plan = FeaturePlan("m", SIGNATURE, [USER, Features("item_id", ["price"], overridable=True)])
    assert plan.needed_keys == ("user_id",)
    given = {"age": 30, "user_id": 7, "price": 2.5}
    assert plan.validate(given).wanted[1] is None
    found = complete(plan, given, user(3, 12.5, "pro"), None)
    assert found == Completed((12.5, 30, 2.5, "pro", 3), (), {"present": 3, "given": 1})
    both = complete(plan, given | {"item_id": 1}, user(3, 12.5, "pro"), None)
    assert both.row == found.row
    with pytest.raises(InvalidInput, match="price"):
        plan.validate({"age": 30, "user_id": 7, "price": "cheap"})


def test_some_of_a_row_given_and_the_rest_read() -> None:
    """A row is read for the features that the request does not give."""
    plan = FeaturePlan(
        "m", Signature([Field("a", "float64"), Field("b", "float64")]), [Features("u", ["a", "b"], overridable=True)]
    )
    assert plan.own == ()
    found = complete(plan, {"u": 1, "b": 5.0}, FeatureRow((1.0, 2.0), NOW))
    assert found.row == (1.0, 5.0)
    assert complete(plan, {"a": 1.0, "b": 2.0}, None).row == (1.0, 2.0)


def test_a_key_can_be_an_input_as_well() -> None:
    """A model that takes the key itself gets it, as the signature has it."""
    plan = FeaturePlan("m", Signature([Field("user_id", "int64"), Field("a", "float64")]), [Features("user_id", ["a"])])
    assert complete(plan, {"user_id": 7}, FeatureRow((1.5,), NOW)).row == (7, 1.5)
    with pytest.raises(InvalidInput, match="user_id"):
        plan.validate({"user_id": "seven"})


def test_a_vector_is_a_feature() -> None:
    """An embedding of another length is an error, not a wrong vector."""
    signature = Signature([Field("v", "float32", (3,))])
    plan = FeaturePlan("m", signature, [Features("u", ["v"], defaults={"v": [0, 0, 0]})])
    assert complete(plan, {"u": 1}, FeatureRow(([1, 2.5, 3],), NOW)).row[0].tolist() == [1, 2.5, 3]
    short = complete(plan, {"u": 1}, FeatureRow(([1, 2.5],), NOW))
    assert short.row[0].tolist() == [0, 0, 0]
    assert short.statuses == {"error": 1}


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (Features("u", ["nothing"]), "no input 'nothing'"),
        (Features("u", ["spend"], defaults={"spend": "much"}), "default of the feature 'spend' does not fit"),
        (Features("u", ["visits"], defaults={"visits": None}), "default of the feature 'visits' does not fit"),
        (Features("u", ["spend"], defaults={"spend": math.inf}), "does not fit"),
    ],
)
def test_a_version_that_does_not_fit_the_declaration_is_not_loaded(declared: Features, said: str) -> None:
    """The error says which feature, before any request does."""
    with pytest.raises(LoadFailed, match=said):
        plan_of("m", SIGNATURE, [declared])


def test_a_model_without_features_has_no_plan() -> None:
    """What is not declared costs nothing."""
    assert plan_of("m", SIGNATURE, ()) is None


VALUES = st.one_of(
    st.sampled_from([None, NoValue.MISSING, NoValue.UNREADABLE, "x", True, [1], math.nan]),
    st.integers(-(2**65), 2**65),
    st.floats(allow_nan=False),
)
ROWS = st.one_of(
    st.sampled_from(["timeout", "error"]),
    st.builds(
        lambda values, age: FeatureRow(tuple(values), age),
        st.lists(VALUES, min_size=3, max_size=3),
        st.one_of(st.none(), st.floats(0, 2 * NOW)),
    ),
)


@given(ROWS, st.one_of(st.sampled_from(["timeout", "error"]), st.builds(item, VALUES)))
def test_whatever_is_read_the_row_fits_or_is_refused(first: Any, second: Any) -> None:
    """No junk from a store reaches a model, and nothing is replaced in silence."""
    plan = FeaturePlan("m", SIGNATURE, [USER, ITEM])
    found = complete(plan, REQUEST, first, second)
    assert sum(found.statuses.values()) == 4
    if found.refusal is None:
        names = [field.name for field in SIGNATURE.inputs]
        SIGNATURE.validate(dict(zip(names, found.row, strict=True)))
        good = found.statuses.get("present", 0) + (found.row[3] is None and found.statuses.get("null", 0) > 0)
        assert len(found.degraded) == 4 - good
