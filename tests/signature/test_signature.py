"""Signatures: what is read off examples, what a request may hold, and what becomes of it."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import UserDict
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # published without types
import numpy as np
import numpy.testing as npt
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from modelserve.errors import InferenceFailed, InvalidInput
from modelserve.http.schemas import inputs_schema
from modelserve.signature import DTYPES, Field, Signature, columns_of, unstack
from modelserve.types import SOLE_OUTPUT, Array
from tests.names import stable

FLOATS = ("float16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SHAPES = ((), (1,), (3,), (2, 3))


def refusal(signature: Signature, inputs: Any) -> InvalidInput:
    """Return the complaint about a request that must not pass."""
    with pytest.raises(InvalidInput) as caught:
        signature.validate(inputs)
    return caught.value


def complaint_about(signature: Signature, inputs: Any) -> InvalidInput | None:
    """Return the complaint about a request, None if it passes."""
    try:
        signature.validate(inputs)
    except InvalidInput as error:
        return error
    return None


def stacked(signature: Signature, requests: Iterable[Any]) -> dict[str, Array]:
    """Return the columns that a model gets for these requests."""
    return signature.stack([signature.validate(request) for request in requests])  # noqa: PD013  # no pandas here


def only(dtype: str, *shape: int, nullable: bool = False) -> Signature:
    """Return a signature of one input ``x``."""
    return Signature([Field("x", dtype, shape, nullable)])


def value_of(signature: Signature, value: Any) -> Any:
    """Return what becomes of a value for the sole input."""
    return signature.validate({"x": value})[0]


# -- strategies --------------------------------------------------------------------------------------------

NULLABLE = (*FLOATS, "string")

fields = st.builds(
    lambda name, dtype, shape, nullable: Field(name, dtype, shape, nullable and dtype in NULLABLE),
    st.text("abcdé_ ", min_size=1, max_size=6),
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.booleans(),
)
signatures = st.lists(fields, min_size=1, max_size=5, unique_by=lambda field: field.name).map(Signature)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


def scalars(field: Field) -> st.SearchStrategy[Any]:
    """Draw JSON values that fit one element of a field."""
    if field.dtype == "string":
        fitting: st.SearchStrategy[Any] = st.text()
    elif field.dtype == "bool":
        fitting = st.booleans()
    elif field.dtype in FLOATS:
        limit = float(np.finfo(field.dtype).max)
        fitting = st.floats(-limit, limit) | st.integers(-1000, 1000)
    else:
        bounds = np.iinfo(field.dtype)
        fitting = st.integers(int(bounds.min), int(bounds.max))
    return fitting | st.none() if field.nullable else fitting


def nested(strategy: st.SearchStrategy[Any], shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Draw nested lists of a shape."""
    for size in reversed(shape):
        strategy = st.lists(strategy, min_size=size, max_size=size)
    return strategy


def requests(signature: Signature) -> st.SearchStrategy[dict[str, Any]]:
    """Draw requests that fit."""
    return st.fixed_dictionaries({field.name: nested(scalars(field), field.shape) for field in signature.inputs})


@st.composite
def near_misses(draw: st.DrawFn, signature: Signature) -> dict[str, Any]:
    """Draw requests with one place changed: most do not fit, some do."""
    request = draw(requests(signature))
    name = draw(st.sampled_from([field.name for field in signature.inputs]))
    edges = st.sampled_from(
        [
            -0.0,
            1.0,
            0.5,
            1e20,
            -1e300,
            65505.0,
            2**31,
            2**63,
            2**64,
            -(2**63) - 1,
            10**400,
            "",
            "1",
            [],
            [[]],
            {},
            [1.0],
        ]
    )
    where = request
    key: Any = name
    while isinstance(where[key], list) and draw(st.booleans()):
        where, key = where[key], draw(st.integers(0, len(where[key]) - 1))
    change = draw(st.sampled_from(["value", "remove", "add"]))
    if change == "remove":
        del where[key]
    elif change == "add":
        request[draw(st.text(max_size=4))] = draw(json_values)
    else:
        where[key] = draw(edges | json_values)
    return request


signature_and_request = signatures.flatmap(lambda s: st.tuples(st.just(s), requests(s)))
signature_and_near_miss = signatures.flatmap(lambda s: st.tuples(st.just(s), near_misses(s)))


# -- what a field may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ({"name": "", "dtype": "float64"}, "signature"),
        ({"name": "n" * 257, "dtype": "float64"}, "signature"),
        ({"name": 3, "dtype": "float64"}, "signature"),
        ({"name": "\ud800", "dtype": "float64"}, "signature"),
        ({"name": "x", "dtype": "complex128"}, "x"),
        ({"name": "x", "dtype": "float"}, "x"),
        ({"name": "x", "dtype": "float32", "shape": (0,)}, "x"),
        ({"name": "x", "dtype": "float32", "shape": (-1, 2)}, "x"),
        ({"name": "x", "dtype": "float32", "shape": (2.0,)}, "x"),
        ({"name": "x", "dtype": "float32", "shape": 3}, "x"),
        ({"name": "x", "dtype": "float32", "shape": (2**32,)}, "x"),
        ({"name": "x", "dtype": "float32", "shape": (1,) * 33}, "x"),
        ({"name": "x", "dtype": "int64", "nullable": True}, "x"),
        ({"name": "x", "dtype": "bool", "nullable": True}, "x"),
    ],
)
def test_what_cannot_be_an_input_is_refused_by_name(field: dict[str, Any], named: str) -> None:
    """A field is checked where it is made."""
    with pytest.raises(InvalidInput) as caught:
        Field(**field)
    assert caught.value.field == named


def test_a_shape_may_be_given_as_any_sequence_of_sizes() -> None:
    """Lists and NumPy sizes become a tuple of ints, so that equal fields are equal and hashable."""
    assert Field("x", "float32", [np.int64(2), 3]) == Field("x", "float32", (2, 3))  # type: ignore[arg-type]
    assert len({Field("x", "float32", [2]), Field("x", "float32", (2,))}) == 1  # type: ignore[arg-type]


def test_a_field_reads_as_its_type() -> None:
    """Complaints show the type, the shape and whether null is allowed."""
    assert str(Field("x", "float32", (3, 224), nullable=True)) == "float32[3, 224] or null"


@pytest.mark.parametrize("inputs", [[], [Field("a", "bool"), Field("a", "int8")]])
def test_a_signature_needs_inputs_of_different_names(inputs: list[Field]) -> None:
    """No input, or two of one name, make no signature."""
    with pytest.raises(InvalidInput, match="signature"):
        Signature(inputs)


@given(signatures)
def test_a_signature_survives_json(signature: Signature) -> None:
    """from_json reads what to_json wrote, through JSON text."""
    again = Signature.from_json(json.loads(json.dumps(signature.to_json())))
    assert again == signature
    assert hash(again) == hash(signature)
    assert repr(again) == repr(signature)


def test_signatures_that_differ_in_anything_are_not_equal() -> None:
    """Name, type, shape, nullability and order all count."""
    different = [
        [Field("a", "float32"), Field("b", "bool")],
        [Field("b", "bool"), Field("a", "float32")],
        [Field("a", "float64"), Field("b", "bool")],
        [Field("a", "float32", (1,)), Field("b", "bool")],
        [Field("a", "float32", nullable=True), Field("b", "bool")],
    ]
    assert len({Signature(inputs) for inputs in different}) == len(different)
    assert Signature(different[0]) != different[0]


# -- reading a signature off an example --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "bool"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_gives_one_input_of_its_dtype_and_row_shape(dtype: str, shape: tuple[int, ...]) -> None:
    """Rows lie along axis 0; the rest is the shape of one row."""
    assert Signature.infer(np.ones((2, *shape), dtype)) == Signature([Field("x", dtype, shape)])


def test_a_byte_order_is_no_part_of_a_type() -> None:
    """A big-endian example gives the plain dtype."""
    assert Signature.infer(np.ones((2, 3), ">f4")) == only("float32", 3)


def test_a_missing_value_in_the_example_makes_its_input_nullable() -> None:
    """NaN in an array, None or NaN in a column: the model was trained on missing values there."""
    assert Signature.infer(np.array([[1.0, math.nan]])) == only("float64", 2, nullable=True)
    assert Signature.infer({"a": [1, None], "b": ["u", None], "c": [1.5, math.nan]}).inputs == (
        Field("a", "float64", nullable=True),
        Field("b", "string", nullable=True),
        Field("c", "float64", nullable=True),
    )


def test_a_frame_says_what_is_missing_in_its_strings() -> None:
    """Each column has a mark of its own; one with two of them has none, and records have but null."""
    frame = pd.DataFrame(
        {
            "none": ["a", None, None],
            "nan": pd.Series(["a", math.nan, "b"], dtype=object),
            "na": pd.array(["a", None, "b"], dtype="string"),
            "category": pd.Categorical(["u", None, "v"]),
            "both": pd.Series(["a", None, math.nan], dtype=object),
            "number": pd.array([1, None, 3], dtype="Int8"),
            "full": ["a", "b", "c"],
        }
    )
    found = {field.name: field.missing for field in Signature.infer(frame).inputs}
    assert found == {
        "none": "None",
        "nan": "NaN",
        "na": "NA",
        "category": "NaN",
        "both": None,
        "number": None,
        "full": None,
    }
    assert Signature.infer([{"a": "x"}, {"a": None}]).inputs == (Field("a", "string", nullable=True),)


def test_the_mark_of_a_missing_string_is_kept_where_there_is_one() -> None:
    """It comes back from JSON; a signature without it reads and writes what it always did, and so are its bytes."""
    plain, marked = Field("a", "string", nullable=True), Field("a", "string", nullable=True, missing="NA")
    assert Signature([plain]).to_json() == {"inputs": [{"name": "a", "dtype": "string", "shape": [], "nullable": True}]}
    for field in (plain, marked):
        signature = Signature([field])
        assert Signature.from_json(signature.to_json()) == signature
    assert canonical(Signature([plain]), {"a": None}) == canonical(Signature([marked]), {"a": None})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "string", "nullable": True, "missing": "nan"},
        {"dtype": "string", "missing": "NaN"},
        {"dtype": "float64", "nullable": True, "missing": "NaN"},
    ],
)
def test_a_mark_that_can_mean_nothing_is_refused(options: dict[str, Any]) -> None:
    """It is one of three, of a string that may be missing; the field is named."""
    with pytest.raises(InvalidInput, match="missing=") as refused:
        Field("a", **options)
    assert refused.value.field == "a"


def test_a_frame_gives_one_input_per_column() -> None:
    """Every dtype a frame can hold and a model can be served with, in the order of the columns."""
    frame = pd.DataFrame(
        {
            "tenure": [1, 2],
            "small": np.array([1, 2], "int8"),
            "spend": np.array([1.5, 2.5], "float32"),
            "income": [1.0, math.nan],
            "plan": ["pro", "basic"],
            "note": ["a", None],
            "flag": [True, False],
            "mixed": pd.Series([1, 2.5], dtype=object),
            "category": pd.Categorical(["u", "v"]),
            "grade": pd.Categorical([3, 1]),
            "gappy_category": pd.Categorical(["u", None]),
            "text": pd.array(["a", "b"], dtype="string"),
            "gappy_text": pd.array(["a", None], dtype="string"),
            "nullable_int": pd.array([1, 2], dtype="Int16"),
            "gappy_int": pd.array([1, None], dtype="Int16"),
            "nullable_float": pd.array([1.5, 2], dtype="Float32"),
            "gappy_float": pd.array([1.5, None], dtype="Float32"),
            "nullable_bool": pd.array([True, False], dtype="boolean"),
        }
    )
    assert {field.name: str(field) for field in Signature.infer(frame).inputs} == {
        "tenure": "int64",
        "small": "int8",
        "spend": "float32",
        "income": "float64 or null",
        "plan": "string",
        "note": "string or null",
        "flag": "bool",
        "mixed": "float64",
        "category": "string",
        "grade": "int64",
        "gappy_category": "string or null",
        "text": "string",
        "gappy_text": "string or null",
        "nullable_int": "int16",
        "gappy_int": "float64 or null",
        "nullable_float": "float32",
        "gappy_float": "float32 or null",
        "nullable_bool": "bool",
    }
    assert list(columns_of(frame)) == list(frame.columns)


def test_mappings_of_columns_and_lists_of_records_give_the_same() -> None:
    """The form of the example does not matter."""
    columns = {"age": [30, 40], "name": ["a", "b"], "image": [[1.0, 2.0], [3.0, 4.0]], "member": [True, False]}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    signature = Signature.infer(columns)
    assert [str(field) for field in signature.inputs] == ["int64", "string", "float64[2]", "bool"]
    assert Signature.infer(records) == signature
    assert Signature.infer(tuple(records)) == signature
    assert Signature.infer({name: np.asarray(column) for name, column in columns.items()}) == signature
    assert Signature.infer(UserDict(columns)) == signature


def test_a_mapping_may_hold_columns_of_a_frame() -> None:
    """Dtypes of pandas' own are understood outside of a frame too."""
    signature = Signature.infer({"a": pd.Series(["u", None], dtype="string"), "b": pd.Series([1, 2], dtype="Int8")})
    assert signature.inputs == (Field("a", "string", nullable=True), Field("b", "int8"))


@pytest.mark.parametrize(
    ("example_rows", "named"),
    [
        ({"good": [1.0], "bad": [1 + 2j]}, "bad"),
        ({"good": [1.0], "bad": [b"bytes"]}, "bad"),
        ({"good": [1.0], "bad": np.array(["2024-01-01"], "datetime64[D]")}, "bad"),
        ({"good": [1.0], "bad": np.ma.masked_array([1.0], [True])}, "bad"),
        ([{"a": 1}, 3], "example"),
        ({"good": [1.0], "bad": [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]}, "bad"),
        ({"good": [1.0], "bad": [Decimal(1)]}, "bad"),
        ({"good": [1.0], "bad": [{"a": 1}]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [1, "a"]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [True, 2]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [True, None]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [None, None]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [[1, "a"], [2, "b"]]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [[1, 2], [3]]}, "bad"),
        ({"good": [1.0, 2.0], "bad": [1.0]}, "bad"),
        ({"good": [1.0], "bad": np.zeros((1, 0))}, "bad"),
        ({"good": [1.0], "bad": np.ones(1, np.longdouble)}, "bad"),
        ([{"good": 1, "bad": 2}, {"good": 1}], "example"),
        ([{"good": 1}, {"good": 1, "bad": 2}], "example"),
        (pd.DataFrame([[1, 2]], columns=["bad", "bad"]), "example"),
        (pd.DataFrame([[1, 2]]), "example"),
        (pd.DataFrame({"bad": pd.to_datetime(["2024-01-01"]).tz_localize("UTC")}), "bad"),
        (pd.DataFrame({"bad": pd.array([True, None], dtype="boolean")}), "bad"),
        ({1: [1.0]}, "example"),
        ({}, "example"),
        ([], "example"),
        (np.zeros((0, 3)), "example"),
        (3.0, "example"),
        ({"a": 3.0}, "example"),
        ([[1, 2], [3]], "example"),
    ],
)
def test_what_cannot_be_served_is_refused_by_column(example_rows: Any, named: str) -> None:
    """An example that gives no signature says which column is at fault."""
    with pytest.raises(InvalidInput) as caught:
        Signature.infer(example_rows)
    assert caught.value.field == named


def test_dates_are_refused_with_the_way_out() -> None:
    """The complaint says what to pass instead."""
    with pytest.raises(InvalidInput, match="as numbers or ISO strings"):
        Signature.infer({"day": np.array(["2024-01-01"], "datetime64[D]")})


def test_the_rows_of_an_example_are_valid_requests() -> None:
    """rows_of returns validated rows in order, up to a limit; record returns each as a request carries it."""
    frame = pd.DataFrame({"n": [1, 2, 3], "f": [0.5, math.nan, 2.0], "s": ["a", None, "c"], "b": [True, False, True]})
    signature = Signature.infer(frame)
    rows = signature.rows_of(frame)
    assert rows[0] == (1, 0.5, "a", True)
    assert len(rows) == 3
    assert signature.rows_of(frame, 2)[1][2] is None
    assert len(signature.rows_of(frame, 99)) == 3
    assert signature.record(rows[1]) == {"n": 2, "f": None, "s": None, "b": False}


@given(signature_and_request)
def test_a_record_is_strict_json_and_the_same_row_again(drawn: tuple[Signature, dict[str, Any]]) -> None:
    """What record returns goes through JSON and validates to the same input."""
    signature, request = drawn
    row = signature.validate(request)
    text = json.dumps(signature.record(row), allow_nan=False)
    assert signature.canonical(signature.validate(json.loads(text))) == signature.canonical(row)


# -- what a request may hold -------------------------------------------------------------------------------


@given(signature_and_near_miss)
@example((only("float64", 2, nullable=True), {"x": [None, "1.5"]}))
@example((only("float64", 2, nullable=True), {"x": [None, [1]]}))
@example((only("float64", 2, nullable=True), {"x": [None, {}]}))
@example((only("float64", 2, nullable=True), {"x": [None, True]}))
@example((only("string", 2), {"x": [1.0, 2.0]}))
@example((only("bool", 2), {"x": [1.0, 2.0]}))
@example((only("bool", 2), {"x": [2**70, 0]}))
@example((only("uint64"), {"x": 1.8446744073709552e19}))
@example((only("int64", 3), {"x": [2**63, -1, 0]}))
@example((only("float32"), {"x": 3.4028236e38}))
@example((only("float16", 1), {"x": [65505.0]}))
@example((only("float64", 1), {"x": [10**400]}))
def test_validate_and_the_published_schema_agree(drawn: tuple[Signature, dict[str, Any]]) -> None:
    """Validate accepts what the JSON schema accepts and refuses what it refuses, always as InvalidInput."""
    signature, request = drawn
    fits_schema = jsonschema.Draft202012Validator(inputs_schema(signature)).is_valid(request)
    complaint = complaint_about(signature, request)
    assert (complaint is None) == fits_schema, complaint


@given(signature_and_request)
def test_every_fitting_request_passes(drawn: tuple[Signature, dict[str, Any]]) -> None:
    """What is drawn to fit fits, whatever the order of its keys."""
    signature, request = drawn
    row = signature.validate(request)
    again = signature.validate(dict(reversed(request.items())))
    assert signature.canonical(again) == signature.canonical(row)


@given(signatures, json_values)
def test_whatever_json_comes_is_answered_or_refused(signature: Signature, value: Any) -> None:
    """Nothing but InvalidInput comes out for any JSON, as the inputs or as one of them."""
    for inputs in (value, {field.name: value for field in signature.inputs}):
        complaint = complaint_about(signature, inputs)
        known = {"", *(field.name for field in signature.inputs)}
        assert complaint is None or complaint.field in known or complaint.field in inputs


@pytest.mark.parametrize(
    ("dtype", "shape", "value"),
    [
        ("float64", (), "1"),
        ("float64", (), True),
        ("float64", (), None),
        ("float64", (), math.nan),
        ("float64", (), math.inf),
        ("float64", (), 10**400),
        ("float64", (), -(10**400)),
        ("float64", (), [1.0]),
        ("float64", (), {}),
        ("float64", (), 1j),
        ("float64", (), Decimal(1)),
        ("float64", (), np.datetime64("2024-01-01")),
        ("float64", (), np.datetime64("2024-01-01", "ns")),
        ("int64", (), np.timedelta64(1, "ns")),
        ("float64", (), np.array(np.datetime64("2024-01-01", "ns"))),
        ("float64", (2,), np.array(["2024-01-01", "2024-01-02"], "datetime64[ns]")),
        ("int64", (2,), [np.datetime64("2024-01-01", "ns"), np.datetime64("2024-01-02", "ns")]),
        ("float64", (), np.ones(1)),
        ("float32", (), 3.5e38),
        ("float16", (), 65520),
        ("int64", (), 1.5),
        ("int64", (), math.inf),
        ("int64", (), math.nan),
        ("int64", (), "1"),
        ("int64", (), False),
        ("int64", (), 2**63),
        ("int8", (), -129),
        ("uint8", (), -1),
        ("uint64", (), 2**64),
        ("bool", (), 1),
        ("bool", (), "true"),
        ("bool", (), None),
        ("string", (), 1),
        ("string", (), None),
        ("string", (), math.nan),
        ("string", (), b"a"),
        ("string", (), "\ud800"),
        ("string", (), ["a"]),
        ("float32", (2,), 1.0),
        ("float32", (2,), "ab"),
        ("float32", (2,), None),
        ("float32", (2,), {"a": 1, "b": 2}),
        ("float32", (2,), [1.0]),
        ("float32", (2,), [1.0, 2.0, 3.0]),
        ("float32", (2,), [[1.0, 2.0]]),
        ("float32", (2,), [1.0, "2"]),
        ("float32", (2,), [1.0, True]),
        ("float32", (2,), [1.0, None]),
        ("float32", (2,), [1.0, math.nan]),
        ("float32", (2,), [1.0, math.inf]),
        ("float32", (2,), [1.0, 10**400]),
        ("float32", (2,), [1.0, 1e39]),
        ("float32", (2,), np.ones(3)),
        ("float32", (2,), np.ones((1, 2))),
        ("float32", (2,), np.array([1.0, 1e39])),
        ("float32", (2,), np.array([1.0, math.nan])),
        ("float32", (2,), np.array([1.0, math.inf])),
        ("float32", (2,), np.array([True, False])),
        ("float32", (2,), np.array(["1", "2"])),
        ("float32", (2,), np.array([1, 2j])),
        ("float16", (2,), np.array([1, 70000])),
        ("int64", (2,), [1, 0.5]),
        ("int64", (2,), [1, 2**63]),
        ("int64", (2,), [1, 2**70]),
        ("int64", (2,), [1, True]),
        ("int64", (2,), np.array([1, 0.5])),
        ("int64", (2,), np.array([1, 2**63], "uint64")),
        ("uint8", (2,), np.array([1, 256])),
        ("uint8", (2,), np.array([1, -1])),
        ("bool", (2,), [True, 1]),
        ("bool", (2,), [1.0, 0.0]),
        ("bool", (2,), np.array([1, 0])),
        ("string", (2,), ["a", 1]),
        ("string", (2,), [1.0, 2.0]),
        ("string", (2,), ["a", None]),
        ("string", (2,), ["a", "\udfff"]),
        ("string", (2,), np.array([1.0, 2.0])),
        ("float32", (2, 2), [[1.0, 2.0], [3.0]]),
        ("float32", (2, 2), [[1.0, 2.0], 3.0]),
        ("float32", (2, 2), [[1.0, 2.0], "ab"]),
        ("float32", (2, 2), [np.ones(2), np.ones(3)]),
        ("float32", (2, 2), [np.array(1.0), np.array(2.0)]),
        ("float32", (2, 2), [[1.0, 2.0], np.array(2.0)]),
    ],
)
def test_what_does_not_fit_is_refused_by_field(dtype: str, shape: tuple[int, ...], value: Any) -> None:
    """The field at fault is named, wherever in the request it stands and whatever else is in it."""
    around = [Field("before", "float64"), Field("x", dtype, shape), Field("after", "string")]
    assert refusal(Signature(around), {"before": 1.0, "x": value, "after": "a"}).field == "x"
    assert refusal(only(dtype, *shape), {"x": value}).field == "x"


def test_a_complaint_about_an_element_says_which() -> None:
    """In a tensor, the index of the first element at fault is named."""
    lists, arrays = [[1.0, 2.0], [3.0, "4"]], np.array([[1.0, 2.0], [3.0, math.nan]])
    assert str(refusal(only("float32", 2, 2), {"x": lists})) == "x: element [1, 1]: expected float32, got a string"
    assert "element [1, 1]" in str(refusal(only("float32", 2, 2), {"x": arrays}))


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "a"),
        ({"a": 1.0}, "b"),
        ({"a": 1.0, "c": 1.0}, "b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "c"),
        ({"a": 1.0, "b": 1.0, 7: 1.0}, "7"),
        ({"a": 1.0, "b": 1.0, "c" * 9999: 1.0}, "c" * 256),
        ({"a": 1.0, 7: 1.0}, "b"),
        ([1.0, 2.0], ""),
        (None, ""),
        ("ab", ""),
        ([("a", 1.0), ("b", 1.0)], ""),
    ],
)
def test_missing_and_unknown_inputs_are_named(inputs: Any, named: str) -> None:
    """A request has exactly the inputs of the signature; the first that is missing or unknown is named."""
    assert refusal(Signature([Field("a", "float64"), Field("b", "float64")]), inputs).field == named


def test_any_mapping_will_do() -> None:
    """A request need not be a dict."""
    assert only("float64").validate(UserDict(x=1.5)) == (1.5,)


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float64", 3, 3.0),
        ("float64", np.float32(0.5), 0.5),
        ("float64", np.int8(-3), -3.0),
        ("float64", np.array(0.5), 0.5),
        ("float16", 65504, 65504.0),
        ("int64", 3.0, 3),
        ("int64", -0.0, 0),
        ("int64", np.uint8(3), 3),
        ("int64", np.float32(-3.0), -3),
        ("uint64", 2**64 - 1, 2**64 - 1),
        ("bool", np.True_, True),
        ("string", np.str_("é"), "é"),
        ("string", "🐢", "🐢"),
        ("string", "", ""),
    ],
)
def test_what_converts_without_loss_is_converted(dtype: str, value: Any, expected: Any) -> None:
    """NumPy scalars and integral floats are taken for what they are worth, as plain Python values."""
    found = value_of(only(dtype), value)
    assert (found, type(found) in {int, float, bool, str}) == (expected, True)


@pytest.mark.parametrize("missing", [None, math.nan, np.float32(math.nan), pd.NA])
@pytest.mark.parametrize("dtype", NULLABLE)
def test_whatever_stands_for_missing_is_missing(dtype: str, missing: Any) -> None:
    """A nullable input takes null in every form: as NaN for numbers, as None for strings, in tensors too."""
    scalar, tensor = only(dtype, nullable=True), only(dtype, 2, nullable=True)
    assert pd.isna(value_of(scalar, missing))
    filling: Any = "a" if dtype == "string" else 1.0
    assert [bool(pd.isna(element)) for element in value_of(tensor, [filling, missing])] == [False, True]
    assert [bool(pd.isna(e)) for e in value_of(tensor, np.array([filling, missing], dtype=object))] == [False, True]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", [[1, 2.5], [3, 4]]),
        ("float32", ((1, 2.5), (3, 4))),
        ("float32", [np.array([1, 2.5]), np.array([3, 4.0])]),
        ("float32", [np.array([1, 2.5]), [3, 4.0]]),
        ("float32", [[np.float64(1), 2.5], [3, np.int8(4)]]),
        ("float32", np.array([[1, 2.5], [3, 4]])),
        ("float32", np.array([[1, 2.5], [3, 4]], ">f8")),
        ("float32", np.array([[1, 3], [2.5, 4]]).T),
        ("float32", np.array([[1, 2.5], [3, 4]], np.longdouble)),
        ("float32", np.array([[1, 2.5], [3, 4]], object)),
        ("float32", pd.DataFrame([[1, 2.5], [3, 4]])),
        ("int16", [[1, 2.0], [3, 4]]),
        ("int16", np.array([[1, 2.0], [3, 4]])),
        ("int16", np.array([[1, 2], [3, 4]], "uint64")),
        ("bool", [[True, False], [False, np.True_]]),
        ("bool", np.array([[True, False], [False, True]])),
        ("string", [["a", "é"], ["", np.str_("d")]]),
        ("string", np.array([["a", "é"], ["", "d"]])),
        ("string", np.array([["a", "é"], ["", "d"]], object)),
    ],
)
def test_a_tensor_may_come_in_any_form(dtype: str, value: Any) -> None:
    """Lists, tuples, arrays, lists of arrays, and what other libraries call an array give the same tensor."""
    found = value_of(only(dtype, 2, 2), value)
    assert found.dtype == (object if dtype == "string" else dtype)
    npt.assert_array_equal(found, np.array([list(row) for row in np.asarray(value)], dtype=found.dtype))


def test_what_looks_like_an_array_and_is_none_is_refused() -> None:
    """An object that fails to become an array is the caller's mistake, with the cause chained."""

    class OnAnotherDevice:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("copy it to host memory first")

    complaint = refusal(only("float32", 2), {"x": OnAnotherDevice()})
    assert complaint.field == "x"
    assert "copy it to host memory first" in str(complaint)


def test_a_row_is_a_copy() -> None:
    """What the caller does to a list or an array after validation does not reach the row."""
    signature = Signature([Field("l", "float64", (2,)), Field("a", "float64", (2,)), Field("s", "string", (1,))])
    inputs: dict[str, Any] = {"l": [1.0, 2.0], "a": np.array([1.0, 2.0]), "s": np.array(["u"], object)}
    row = signature.validate(inputs)
    before = signature.canonical(row)
    inputs["l"][0], inputs["a"][0], inputs["s"][0] = 9.0, 9.0, "v"
    inputs.clear()
    assert signature.canonical(row) == before
    assert row[1].base is None


# -- rows to columns ---------------------------------------------------------------------------------------


@given(signatures.flatmap(lambda s: st.tuples(st.just(s), st.lists(requests(s), min_size=1, max_size=4))))
def test_stacked_rows_are_numpys_own_conversion(drawn: tuple[Signature, list[dict[str, Any]]]) -> None:
    """Columns are what np.array makes of the values, null as NaN, with rows along axis 0."""
    signature, batch = drawn
    columns = stacked(signature, batch)
    assert list(columns) == [field.name for field in signature.inputs]
    for field in signature.inputs:
        values = [request[field.name] for request in batch]
        expected = np.array(values, dtype=object).reshape(len(batch), *field.shape)
        if field.dtype != "string":
            expected = np.where(expected == None, math.nan, expected).astype(field.dtype)  # noqa: E711
        assert columns[field.name].dtype == field.numpy_dtype
        npt.assert_array_equal(columns[field.name], expected)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "bool"])
@given(data=st.data())
def test_arrays_pass_through_unchanged(dtype: str, data: st.DataObject) -> None:
    """An array of the field's own dtype and shape comes out of the stack as it went in."""
    elements = {"allow_nan": False, "allow_infinity": False} if dtype in FLOATS else {}
    array = data.draw(st_numpy.arrays(dtype, (3, 2), elements=elements or None))
    signature = only(dtype, 2)
    npt.assert_array_equal(stacked(signature, [{"x": row} for row in array])["x"], array)


# -- canonical bytes ---------------------------------------------------------------------------------------


def in_another_form(draw: st.DrawFn, field: Field, value: Any) -> Any:
    """Return the same value, written differently."""
    if isinstance(value, list):
        if field.dtype != "string" and draw(st.booleans()):
            filled = np.array(value, dtype=object)
            filled[filled == None] = math.nan  # noqa: E711
            return filled.astype(field.dtype)
        return [in_another_form(draw, field, part) for part in value]
    if isinstance(value, bool | str | None):
        return math.nan if value is None and draw(st.booleans()) else value
    if value == 0:
        return draw(st.sampled_from([0, 0.0, -0.0]))
    whole = float(value).is_integer() and int(float(value)) == value
    forms = [value, float(value), int(value)] if whole else [value]
    return draw(st.sampled_from(forms))


@given(signature_and_request, st.data())
def test_canonical_bytes_do_not_depend_on_the_form(
    drawn: tuple[Signature, dict[str, Any]], data: st.DataObject
) -> None:
    """1 and 1.0, −0.0 and 0.0, null and NaN, lists and arrays, keys in any order: equal inputs, equal bytes."""
    signature, request = drawn
    types = {field.name: field for field in signature.inputs}

    @st.composite
    def rewritten(draw: st.DrawFn) -> dict[str, Any]:
        names = draw(st.permutations(list(request)))
        return {name: in_another_form(draw, types[name], request[name]) for name in names}

    other = data.draw(rewritten())
    assert canonical(signature, other) == canonical(signature, request)


def canonical(signature: Signature, request: dict[str, Any]) -> bytes:
    """Return a request's canonical bytes."""
    return signature.canonical(signature.validate(request))


def comparable(signature: Signature, request: dict[str, Any]) -> list[Any]:
    """Return what the model gets, so that equal inputs are equal lists."""
    columns = stacked(signature, [request]).values()
    return [json.dumps((column + 0 if column.dtype.kind in "iuf" else column).tolist()) for column in columns]


@given(signatures.flatmap(lambda s: st.tuples(st.just(s), requests(s), requests(s))))
def test_canonical_bytes_tell_different_inputs_apart(
    drawn: tuple[Signature, dict[str, Any], dict[str, Any]],
) -> None:
    """Two requests have equal bytes exactly if the model gets the same numbers and strings."""
    signature, one, other = drawn
    same = comparable(signature, one) == comparable(signature, other)
    assert (canonical(signature, one) == canonical(signature, other)) == same


def test_the_order_of_the_inputs_is_not_part_of_the_canonical_form() -> None:
    """Two signatures with the same inputs in another order give the same bytes."""
    inputs = [Field("b", "float32"), Field("a", "string"), Field("é", "bool")]
    request = {"a": "u", "b": 1.5, "é": True}
    assert canonical(Signature(inputs), request) == canonical(Signature(reversed(inputs)), request)


def test_types_and_shapes_are_part_of_the_canonical_form() -> None:
    """The same number in another dtype, or in another shape, is another input."""
    forms = [only("int64"), only("uint64"), only("float64"), only("float64", 1), only("float64", 1, 1)]
    values: list[Any] = [1, 1, 1, [1], [[1]]]
    assert len({canonical(s, {"x": value}) for s, value in zip(forms, values, strict=True)}) == len(forms)


def test_strings_cannot_run_into_each_other() -> None:
    """Lengths keep neighbours apart, and null is not the empty string."""
    signature = Signature([Field("a", "string", nullable=True), Field("b", "string", nullable=True)])
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc"), (None, "abc"), ("abc", None), ("abc", "")]
    assert len({canonical(signature, {"a": a, "b": b}) for a, b in pairs}) == len(pairs)


# -- outputs -----------------------------------------------------------------------------------------------


def test_a_sole_output_is_answered_bare() -> None:
    """One unnamed output gives plain values, lists where it has a shape."""
    assert unstack({"output": np.array([1.5, 2.5])}, 2) == [1.5, 2.5]
    assert unstack({"output": np.array([[1, 2], [3, 4]])}, 2) == [[1, 2], [3, 4]]
    assert unstack({"output": np.array(["a", "b"])}, 2) == ["a", "b"]
    assert type(unstack({"output": np.array([1.5], "float32")}, 1)[0]) is float


def test_named_outputs_are_answered_by_name() -> None:
    """Several outputs, or one with a name of its own, give a mapping per row."""
    outputs = {"label": np.array(["a", "b"]), "score": np.array([0.1, 0.9])}
    assert unstack(outputs, 2) == [{"label": "a", "score": 0.1}, {"label": "b", "score": 0.9}]
    assert unstack({"score": np.array([0.5])}, 1) == [{"score": 0.5}]


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (np.zeros(3), "3 rows for 2"),
        (np.zeros((1, 2)), "1 rows for 2"),
        (np.array(1.0), "a single value for 2"),
        ([1.0, 2.0], "a list"),
        (np.array([1j, 2j]), "complex128"),
        (np.array([b"a", b"b"]), "S1"),
        (np.array(["2024-01-01", "2024-01-02"], "datetime64[D]"), "datetime64"),
    ],
)
def test_what_is_no_answer_to_the_batch_is_refused(column: Any, problem: str) -> None:
    """A column must be an array of one JSON value per row."""
    with pytest.raises(InferenceFailed, match=problem) as caught:
        unstack({"good": np.zeros(2), "bad": column}, 2)
    assert "'bad'" in str(caught.value)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_that_works_in_place_leaves_the_rows_alone(rows: int) -> None:
    """A batch is the model's own, of one row too: what was asked is still to be logged, and may be asked again."""
    signature = Signature([Field("x", "float64", (3,)), Field("y", "float32", (2, 2)), Field("z", "float64")])
    row = signature.validate({"x": np.ones(3), "y": np.ones((2, 2), "float32"), "z": 1.0})
    for column in signature.stack([row] * rows).values():  # noqa: PD013  # no frame
        column[...] = 0
    assert signature.record(row) == {"x": [1, 1, 1], "y": [[1, 1], [1, 1]], "z": 1}


@pytest.mark.parametrize("answer", [{1}, {1: 2.0}, 2**70, "\ud800", object()], ids=stable)
def test_an_answer_without_a_json_form_is_a_failure(answer: Any) -> None:
    """What cannot be sent is no answer, wherever the model runs."""
    column = np.empty(2, dtype=object)
    column[:] = ["fine", None]
    column[1] = answer
    with pytest.raises(InferenceFailed, match="no JSON form"):
        unstack({SOLE_OUTPUT: column}, 2)


def test_no_column_is_no_answer() -> None:
    """A model that answers nothing answers wrongly."""
    with pytest.raises(InferenceFailed, match="no column"):
        unstack({}, 1)
