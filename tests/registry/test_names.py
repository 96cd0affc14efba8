"""What a model and a version may be called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.errors import InvalidInput
from modelserve.registry.names import check_names, is_name


@pytest.mark.parametrize("text", ["churn", "1.4.2", "0", "A_b-c.d+e", "1.0.0+build.7", "x" * 128])
def test_names_in_use_are_accepted(text: str) -> None:
    """Letters, digits and the punctuation of version numbers are fine for either."""
    check_names(text, text)


@pytest.mark.parametrize("text", ["", ".hidden", "-x", "_x", "a/b", "a b", "a\n", "..", "é", "a\0", "x" * 129, "a:b"])
@pytest.mark.parametrize("field", ["model_name", "version"])
def test_other_names_are_refused_by_field(field: str, text: str) -> None:
    """A name that would not survive a URL or a path is refused, and the field is named."""
    with pytest.raises(InvalidInput) as caught:
        check_names(**({"model_name": "churn", "version": "1"} | {field: text}))
    assert caught.value.field == field


def test_the_name_of_a_route_is_refused_for_a_model_only() -> None:
    """``/predict/batch`` is no model; a version may be called so."""
    check_names("churn", "batch")
    with pytest.raises(InvalidInput, match="route") as caught:
        check_names("batch", "1")
    assert caught.value.field == "model_name"


@given(st.text(max_size=140))
def test_a_name_needs_no_escaping(text: str) -> None:
    """Whatever passes is ASCII, short, and free of separators."""
    if is_name(text):
        assert text.isascii()
        assert 1 <= len(text) <= 128
        assert not set(text) & set("/\\%?# :@\0\n")


@pytest.mark.parametrize("value", [None, 1, b"churn", ["churn"]])
def test_only_text_is_a_name(value: object) -> None:
    """A number is no version."""
    assert not is_name(value)
