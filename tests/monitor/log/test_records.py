"""Records: what is kept of an answer, and what is not."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import json
import struct
from typing import Any, NoReturn

import numpy as np
import pytest

from modelserve.errors import InferenceFailed, InvalidInput
from modelserve.events import Served
from modelserve.ids import uuid7_source
from modelserve.monitor.log.records import MAX_JSON, RecordMaker, json_text
from modelserve.signature import Field, Signature
from modelserve.types import LogRecord
from tests.monitor.answers import SIGNATURE, served

NOW = dt.datetime(2026, 11, 25, tzinfo=dt.UTC)


def records_of(event: Served, *, keeps_inputs: bool = True, key: bytes | None = None) -> list[LogRecord]:
    maker = RecordMaker(event, keeps_inputs=keeps_inputs, key=key, new_id=uuid7_source())
    return maker(event, None if event.error is None else maker.told(event.error), NOW)


def beginning(*parts: str) -> bytes:
    return b"mi1\0" + b"".join(struct.pack("<I", len(part)) + part.encode() for part in parts)


def test_every_row_has_a_record() -> None:
    """Rows of a request share its id and have their place in it; each has an id of its own."""
    records = records_of(served(rows=3))
    assert [record.row_index for record in records] == [0, 1, 2]
    assert {record.request_id for record in records} == {"r"}
    assert len({record.id for record in records}) == 3
    assert json.loads(records[2].inputs or "") == {"tenure": 2, "plan": "pro"}
    assert records[2].prediction == "0.2"


def test_the_hash_is_that_of_version_and_canonical_input() -> None:
    """Another implementation of the documented hash finds the same; equal inputs of another version differ."""
    event = served()
    canonical = SIGNATURE.canonical(event.inputs[0])
    expected = hashlib.sha256(beginning("m", "1", "ab" * 32) + canonical).hexdigest()
    assert records_of(event)[0].input_hash == expected
    assert records_of(served(version="2"))[0].input_hash != expected


def test_with_a_key_the_hash_is_an_hmac() -> None:
    """Without the key nobody can make the hash of a guessed input."""
    event, key = served(), b"0123456789abcdef"
    message = beginning("m", "1", "ab" * 32) + SIGNATURE.canonical(event.inputs[0])
    assert records_of(event, key=key)[0].input_hash == hmac.digest(key, message, "sha256").hex()


def test_inputs_that_are_not_to_be_kept_are_nowhere() -> None:
    """With ``log_inputs=False`` the hash stays, and no error quotes a value."""
    failed = InferenceFailed("cannot take 'secret'")
    for event in (served(), served(error=failed, values=())):
        (record,) = records_of(event, keeps_inputs=False)
        assert record.inputs is None
        assert record.input_hash is not None
        assert record.error in {None, "InferenceFailed"}


def test_a_record_says_what_was_known_and_what_was_made_up() -> None:
    """Each row says whether it came from the cache, and which of its features have their default."""
    records = records_of(served(rows=2, cached=[True, False], degraded=[(), ("visits", "spend")]))
    assert [record.cached for record in records] == [True, False]
    assert [record.degraded for record in records] == [None, '["visits","spend"]']


def test_a_request_that_does_not_fit_is_one_record_without_inputs() -> None:
    """What was refused has no canonical form: its record has the reason alone."""
    (record,) = records_of(served(rows=2, inputs=(), values=(), error=InvalidInput("tenure", "missing")))
    assert (record.inputs, record.input_hash, record.prediction) == (None, None, None)
    assert record.error == "InvalidInput: tenure: missing"


def test_a_foreign_error_is_told_by_its_kind_alone() -> None:
    """The words of an error that is none of the library's may say anything."""
    (record,) = records_of(served(values=(), error=ValueError("postgresql://user:secret@db")))
    assert record.error == "ValueError"


def test_a_long_error_is_cut() -> None:
    """An error takes no more room than a few lines."""
    (record,) = records_of(served(values=(), error=InferenceFailed("x" * 10_000)))
    assert record.error is not None
    assert len(record.error) == 500


def test_inputs_of_every_type_are_as_a_request_would_carry_them() -> None:
    """The fast way to JSON writes what the signature's own does, for every type, shape and missing value."""
    fields = [
        Field(dtype, dtype, shape) for dtype in ("float16", "float32", "int8", "uint64", "bool") for shape in [()]
    ]
    fields += [Field(f"{field.name}s", field.dtype, (2, 2)) for field in fields]
    texts = [Field("text", "string", (), nullable=True), Field("texts", "string", (2,), nullable=True)]
    gaps = [Field("gap", "float64", (), nullable=True), Field("gaps", "float32", (2,), nullable=True)]
    signature = Signature([*fields, *texts, *gaps])
    scalars: dict[str, Any] = {"float16": 0.5, "float32": 0.25, "int8": -3, "uint64": 2**63, "bool": True}
    inputs = scalars | {f"{name}s": [[value] * 2] * 2 for name, value in scalars.items()}
    inputs |= {"text": None, "texts": ["ü", None], "gap": None, "gaps": [None, 1.5]}
    row = signature.validate(inputs)
    (record,) = records_of(served(signature=signature, inputs=[row]))
    assert json.loads(record.inputs or "") == signature.record(row) == inputs


def test_large_inputs_leave_their_hash() -> None:
    """Inputs and predictions beyond the bound are left out; their size counts while they wait."""
    signature = Signature([Field("picture", "float32", (3, 300, 300)), Field("words", "string", (4,))])
    row = signature.validate({"picture": np.zeros((3, 300, 300), "float32"), "words": ["a" * 30_000] * 4})
    event = served(signature=signature, inputs=[row], values=[[0.5] * 40_000])
    (record,) = records_of(event)
    assert record.inputs is None
    assert record.prediction is None
    assert len(record.input_hash or "") == 64
    maker = RecordMaker(event, keeps_inputs=True, key=None, new_id=uuid7_source())
    assert maker.size_of(event, None) > 3 * 300 * 300 * 4 + 4 * 30_000 + 40_000 * 8


def test_ragged_predictions_count_in_full() -> None:
    """Room is taken for all of an answer, whatever its first row is like."""
    maker = RecordMaker(served(), keeps_inputs=True, key=None, new_id=uuid7_source())
    boxes = [[], [[0.5] * 1000] * 10, {"text": "x" * 1000}]
    assert maker.size_of(served(rows=3, values=boxes), None) > 10 * 1000 * 8 + 1000
    assert maker.size_of(served(), "InvalidInput: " + "x" * 400) > maker.size_of(served(), None) + 400


def test_texts_that_are_a_little_too_long_are_left_out() -> None:
    """The bound is that of the JSON text."""
    for length, kept in ((MAX_JSON - 100, True), (MAX_JSON, False)):
        row = SIGNATURE.validate({"tenure": 1, "plan": "p" * length})
        assert (records_of(served(inputs=[row]))[0].inputs is not None) == kept


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "null"),
        ({"score": np.float32(0.5), 3: [1, 2]}, '{"score":0.5,"3":[1,2]}'),
        (1 << 70, None),
        ("\ud800", None),
        ("ü", '"ü"'),
        ("a\0b", '"a\N{REPLACEMENT CHARACTER}b"'),
        ("\\u0000 \\\0", r'"\\u0000 \\' + '\N{REPLACEMENT CHARACTER}"'),
    ],
)
def test_predictions_as_json(value: object, text: str | None) -> None:
    """NaN is null, and what has no JSON form is left out."""
    assert json_text(value) == text


class _Untouched:
    """An input that must not be looked at."""

    def ravel(self) -> NoReturn:
        raise AssertionError

    def __len__(self) -> NoReturn:
        raise AssertionError


@pytest.mark.parametrize("failed", [False, True])
def test_very_many_strings_are_not_looked_at(failed: bool) -> None:  # noqa: FBT001  # a case
    """A request of too many strings has a record for each row without inputs and hash; none is measured."""
    signature = Signature([Field("x", "string", (100_000,))])
    changed: dict[str, Any] = {"error": InferenceFailed("no"), "values": ()} if failed else {}
    event = served(rows=3, inputs=[(_Untouched(),)] * 3, signature=signature, **changed)
    maker = RecordMaker(event, keeps_inputs=True, key=None, new_id=uuid7_source())
    kept = maker.kept(event)
    assert maker.size_of(kept, None) < 100_000
    records = maker(kept, "InferenceFailed" if failed else None, NOW)
    assert [(record.row_index, record.inputs, record.input_hash) for record in records] == [
        (i, None, None) for i in range(3)
    ]
    assert [record.error is not None for record in records] == [failed] * 3


def test_as_many_strings_as_are_kept_have_their_hash() -> None:
    """Below the bound an answer waits as it is."""
    signature = Signature([Field("x", "string", (100_000,))])
    event = served(rows=2, inputs=[(_Untouched(),)] * 2, signature=signature)
    maker = RecordMaker(event, keeps_inputs=True, key=None, new_id=uuid7_source())
    assert maker.kept(event) is event
