"""What is signed: all that decides what is loaded, in one form."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.signing import statement_of
from tests.signing.rows import CHANGES, VERSION

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_the_statement_is_these_bytes() -> None:
    """The form is pinned: signatures that were made with one release are valid in the next."""
    assert statement_of(VERSION) == (
        b"modelserve version 1\n"
        b'{"artifact":{"format":"skops","key":"blobs/sha256/' + b"a" * 64 + b'","sha256":"' + b"a" * 64 + b'",'
        b'"size":10},"example":{"format":"example-json","key":"blobs/sha256/' + b"b" * 64 + b'","sha256":"'
        b"" + b"b" * 64 + b'","size":20},"framework":"sklearn","load_options":{"method":"predict",'
        b'"trusted":["acme.LogRatio"]},"model_name":"churn","signature":{"inputs":[{"dtype":"float64","name":"x",'
        b'"nullable":false,"shape":[2]}]},"version":"1.4.2"}'
    )


@pytest.mark.parametrize("change", CHANGES)
def test_each_field_that_decides_what_is_loaded_is_part_of_it(change: str) -> None:
    """A row in which one of them differs has another statement."""
    assert statement_of(CHANGES[change](VERSION)) != statement_of(VERSION)


def test_what_decides_nothing_is_no_part_of_it() -> None:
    """Promoting a version, or noting a metric beside it, leaves its signatures valid."""
    other = dataclasses.replace(
        VERSION, id=2, status="production", metrics={}, tags={}, created_at=dt.datetime.now(dt.UTC), attestation="x"
    )
    assert statement_of(other) == statement_of(VERSION)


def _as_a_database_gives_it_back(value: Any) -> Any:
    """Reverse the keys, and write whole numbers as PostgreSQL's JSONB does."""
    if isinstance(value, dict):
        return {key: _as_a_database_gives_it_back(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [_as_a_database_gives_it_back(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) > 1e16 else value


@given(st.dictionaries(st.text(), _json, max_size=4))
def test_the_way_through_a_database_changes_nothing(options: dict[str, Any]) -> None:
    """Neither the order of keys nor the way in which a number is written matters."""
    version = dataclasses.replace(VERSION, load_options=options)
    returned = _as_a_database_gives_it_back(json.loads(json.dumps(options)))
    assert statement_of(dataclasses.replace(VERSION, load_options=returned)) == statement_of(version)


@given(_json, _json)
def test_different_values_have_different_statements(one: Any, other: Any) -> None:
    """No two options look the same once they are written: the statement reads back as what it was made of."""
    first, second = (statement_of(dataclasses.replace(VERSION, load_options={"x": each})) for each in (one, other))
    assert json.loads(first.partition(b"\n")[2])["load_options"] == {"x": one}
    assert json.loads(second.partition(b"\n")[2])["load_options"] == {"x": other}
