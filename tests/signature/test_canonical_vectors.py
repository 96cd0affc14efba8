"""The published test vectors of the canonical form: what the library computes, and what its documented layout says."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.signature import Field, Signature
from modelserve.signature.digest import input_digest
from tests.serving.versions import version_of

VECTORS = Path(__file__).parents[2] / "docs" / "reference" / "canonical_input_vectors.json"
CASES: list[dict[str, Any]] = json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]

ELEMENTS = {
    "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q",
    "float16": "e", "float32": "f", "float64": "d", "bool": "?",
}  # fmt: skip
QUIET_NAN = {"float16": "007e", "float32": "0000c07f", "float64": "000000000000f87f"}

vectors = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def canonical(case: dict[str, Any], inputs: dict[str, Any] | None = None) -> bytes:
    """Compute a case's canonical bytes with the library."""
    signature = Signature.from_json(case["signature"])
    return signature.canonical(signature.validate(case["inputs"] if inputs is None else inputs))


# -- the documented layout, once more, from nothing but struct ---------------------------------------------


def by_the_layout(signature: dict[str, Any], inputs: dict[str, Any]) -> bytes:
    """Compute canonical bytes from the layout as it is documented, without the library."""
    fields = sorted(signature["inputs"], key=lambda field: field["name"].encode("utf-8"))
    return b"ms1\x00" + b"".join(header(field) + values(field, inputs[field["name"]]) for field in fields)


def header(field: dict[str, Any]) -> bytes:
    """Name, dtype and shape."""
    name, dtype, shape = str(field["name"]).encode("utf-8"), str(field["dtype"]).encode("ascii"), field["shape"]
    sizes = struct.pack(f"<{len(shape)}I", *shape)
    return struct.pack("<I", len(name)) + name + bytes([len(dtype)]) + dtype + bytes([len(shape)]) + sizes


def values(field: dict[str, Any], value: Any) -> bytes:
    """Every element, in C order."""
    encode = string if field["dtype"] == "string" else element
    return b"".join(encode(field["dtype"], leaf) for leaf in leaves(value, len(field["shape"])))


def leaves(value: Any, depth: int) -> list[Any]:
    """Flatten nested lists of a known depth."""
    return [value] if depth == 0 else [leaf for part in value for leaf in leaves(part, depth - 1)]


def element(dtype: str, value: Any) -> bytes:
    """Encode a number or a boolean: little-endian, one zero, one NaN."""
    if dtype in QUIET_NAN and (value is None or math.isnan(value)):
        return bytes.fromhex(QUIET_NAN[dtype])
    if value == 0 and dtype != "bool":
        value = 0
    packed: bytes = struct.pack("<" + ELEMENTS[dtype], int(value) if "int" in dtype else value)
    return packed


def string(_: str, value: str | None) -> bytes:
    """Encode a string: its length and UTF-8 bytes, or the length that stands for null."""
    if value is None:
        return b"\xff\xff\xff\xff"
    return struct.pack("<I", len(value.encode("utf-8"))) + value.encode("utf-8")


def digest_by_the_layout(model_name: str, version: str, sha256: str, canonical: bytes) -> bytes:
    """Compute the digest of an input from its documented layout, without the library."""
    texts = [text.encode("utf-8") for text in (model_name, version, sha256)]
    return hashlib.sha256(
        b"mi1\x00" + b"".join(struct.pack("<I", len(text)) + text for text in texts) + canonical
    ).digest()


# -- the vectors -------------------------------------------------------------------------------------------


@vectors
def test_the_library_computes_the_published_bytes(case: dict[str, Any]) -> None:
    """Signature.canonical gives exactly the bytes and the digest that were published."""
    data = canonical(case)

    assert data.hex() == case["canonical"]
    assert hashlib.sha256(data).hexdigest() == case["sha256"]


@vectors
def test_the_layout_gives_the_published_bytes(case: dict[str, Any]) -> None:
    """Whoever follows the documented layout with nothing but struct arrives at the published bytes."""
    assert by_the_layout(case["signature"], case["inputs"]).hex() == case["canonical"]


@vectors
def test_what_travels_through_json_again_stays_the_same(case: dict[str, Any]) -> None:
    """The record of a validated row, sent as a request once more, has the same canonical bytes."""
    signature = Signature.from_json(case["signature"])
    record = signature.record(signature.validate(case["inputs"]))

    assert canonical(case, json.loads(json.dumps(record, allow_nan=False))).hex() == case["canonical"]


def test_every_dtype_has_a_vector() -> None:
    """The vectors show every type that an input can have."""
    shown = {field["dtype"] for case in CASES for field in case["signature"]["inputs"]}

    assert shown == {*ELEMENTS, "string"}


def test_names_of_vectors_are_unique() -> None:
    """Each case can be named in a bug report."""
    assert len({case["name"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("same", ["the one zero", "names in byte order", "a whole number in a float"])
def test_vectors_that_say_the_same_agree(same: str) -> None:
    """Cases that differ only in how the request was written have one digest."""
    digests = {case["sha256"] for case in CASES if case["name"].startswith(same)}

    assert len(digests) == 1
    assert sum(case["name"].startswith(same) for case in CASES) > 1


def test_the_other_vectors_differ() -> None:
    """Null, the empty string, another dtype and another shape are all told apart."""
    families = {case["name"].partition(":")[0] for case in CASES}

    assert len({case["sha256"] for case in CASES}) == len(families)


def test_nan_and_null_are_one_missing_value() -> None:
    """A NaN from Python and a null from JSON give the same bytes."""
    case = next(case for case in CASES if case["name"] == "a missing float64")

    assert canonical(case, {"age": math.nan}) == canonical(case, {"age": None}) == canonical(case)


# -- the digest of an input to a version -------------------------------------------------------------------


@vectors
def test_the_digest_is_the_documented_one(case: dict[str, Any]) -> None:
    """Whoever follows the documented layout arrives at the digest that keys cached predictions."""
    signature = Signature.from_json(case["signature"])
    digest = input_digest(version_of(), signature.canonical)(signature.validate(case["inputs"]))
    assert digest == digest_by_the_layout("churn", "1.4.2", "5f" * 32, bytes.fromhex(case["canonical"]))


def test_no_two_versions_share_a_digest() -> None:
    """Model, version, artifact and input each tell apart, also where one ends as the next begins."""
    signature = Signature([Field("x", "float64")])
    versions = [
        version_of(),
        version_of(model_name="fraud"),
        version_of(version="1.4.3"),
        version_of(sha256="60" * 32),
        version_of(model_name="churn1", version=".4.2"),
    ]
    digests = {input_digest(each, signature.canonical)((x,)) for each in versions for x in (0.0, 1.0)}
    assert len(digests) == 10


SCALARS = {
    "float64": st.floats(allow_infinity=False) | st.integers(-(2**60), 2**60),
    "float32": st.floats(allow_infinity=False, width=32) | st.floats(-1e38, 1e38),
    "float16": st.floats(allow_infinity=False, width=16) | st.floats(-6e4, 6e4),
    "int8": st.integers(-128, 127),
    "uint64": st.integers(0, 2**64 - 1),
    "bool": st.booleans(),
    "string": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
}


@given(st.data())
def test_any_mixture_of_inputs_is_written_as_documented(data: st.DataObject) -> None:
    """Scalars of all types side by side, with shapes between them, missing or not, follow the layout to the byte."""
    dtypes = data.draw(st.lists(st.sampled_from(sorted(SCALARS)), min_size=1, max_size=8))
    shapes = [data.draw(st.sampled_from([(), (), (2,)])) for _ in dtypes]
    nullable = {"float16", "float32", "float64", "string"}
    names = data.draw(st.permutations([f"n{i}" for i in range(len(dtypes))]))
    fields = [Field(n, d, s, nullable=d in nullable) for n, d, s in zip(names, dtypes, shapes, strict=True)]
    inputs = {
        field.name: [data.draw(SCALARS[field.dtype]) for _ in range(2)]
        if field.shape
        else data.draw(SCALARS[field.dtype])
        for field in fields
    }
    signature = Signature(fields)
    assert signature.canonical(signature.validate(inputs)) == by_the_layout(
        signature.to_json(), rounded(fields, inputs)
    )


def rounded(fields: list[Field], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of narrow types as these hold them."""
    narrow = {"float16": np.float16, "float32": np.float32}
    return {
        field.name: inputs[field.name]
        if field.dtype not in narrow
        else np.array(inputs[field.name], dtype=narrow[field.dtype]).tolist()
        for field in fields
    }
