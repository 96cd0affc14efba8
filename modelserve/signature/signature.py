"""The inputs of a model, as one value: what validates requests and stacks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from modelserve.errors import InvalidInput
from modelserve.signature.acceptance import acceptance, is_plain, picker
from modelserve.signature.batches import stack_column
from modelserve.signature.canonical import writer
from modelserve.signature.examination import examiner, kind_of, plain
from modelserve.signature.examples import columns_of, infer_field, json_value, with_mark
from modelserve.signature.fields import MAX_NAME, Field
from modelserve.signature.forms import is_frame
from modelserve.signature.large import examined, stand_in, takes_steps
from modelserve.turns import Steps
from modelserve.types import Array, Json, Row


class Signature:
    """The inputs of a model, in the order the model takes them.

    >>> signature = Signature([Field("tenure", "int64"), Field("plan", "string")])
    >>> signature.validate({"plan": "pro", "tenure": 12})
    (12, 'pro')
    >>> signature.validate({"plan": "pro", "tenure": "twelve"})
    Traceback (most recent call last):
    modelserve.errors.InvalidInput: tenure: expected int64, got a string
    """

    __slots__ = ("_examiners", "_fits", "_names", "_others", "_pick", "_shaped", "_write", "inputs", "size", "strings")

    def __init__(self, inputs: Iterable[Field]) -> None:
        self.inputs = tuple(inputs)
        if not self.inputs:
            raise InvalidInput("signature", "a model needs at least one input")
        self._names = tuple(field.name for field in self.inputs)
        if len(set(self._names)) != len(self._names):
            raise InvalidInput("signature", "two inputs have the same name")
        self._pick = picker(self._names)
        self._fits = acceptance(self.inputs)
        self._examiners = tuple(examiner(field) for field in self.inputs)
        self._others = tuple((i, self._examiners[i]) for i, field in enumerate(self.inputs) if not is_plain(field))
        self._write = writer(self.inputs)
        self._shaped = {field.name: field for field in self.inputs if field.shape}
        self.size = sum(math.prod(field.shape) for field in self.inputs)
        """How many elements one row has."""
        self.strings = sum(math.prod(field.shape) for field in self.inputs if field.dtype == "string")
        """How many of them are strings. What is done with these is done one by one, with numbers all at once."""

    # -- the request path ----------------------------------------------------------------------------------

    def validate(self, inputs: Any) -> Row:
        """Return the values of one request in the order of the signature, or raise ``InvalidInput`` naming the field.

        ``inputs`` maps every input's name to its value: Python or NumPy scalars, strings, (nested) lists or arrays.
        Numbers are never made from strings or booleans, nor whole numbers from fractions; ±Inf is refused.
        Values are copied: what the caller does to a list or an array afterwards does not reach the model.
        """
        if type(inputs) is not dict and not isinstance(inputs, Mapping):
            raise InvalidInput("", f"inputs must be an object that maps names to values, got {kind_of(inputs)}")
        if len(inputs) != len(self._names):
            self._refuse_names(inputs)
        try:
            values = self._pick(inputs)
        except KeyError:
            self._refuse_names(inputs)
        if not self._fits(values):
            return tuple(examine(value) for examine, value in zip(self._examiners, values, strict=True))
        return self._with_others_examined(values) if self._others else values

    def prepare(self, inputs: Any) -> Steps[Any]:
        """Examine the large values of one request in steps, and return the request with them for :meth:`validate`.

        Raises ``InvalidInput`` as that does. What is small, or of no form that JSON has, is left as it is.
        """
        if not isinstance(inputs, dict):
            return stand_in(inputs)
        found = {}
        for name, value in inputs.items():
            field = self._shaped.get(name)
            if field is None:
                found[name] = stand_in(value)
            elif takes_steps(field, value):
                found[name] = yield from examined(field, value)
        return inputs | found

    def stack(self, rows: Sequence[Row]) -> dict[str, Array]:
        """Turn n validated rows into columns: per input an array of shape ``(n, *shape)``."""
        return {
            field.name: stack_column(field, column)
            for field, column in zip(self.inputs, zip(*rows, strict=True), strict=True)
        }

    def canonical(self, row: Row) -> bytes:
        r"""Return the canonical bytes of a validated row: equal for equal inputs, whatever JSON they came from.

        Layout (all integers little-endian): ``b"ms1\0"``, then per input in the byte order of its UTF-8 name:
        u32 length and bytes of the name, u8 length and bytes of the dtype, u8 number of dimensions, u32 per
        dimension, then the values in C order: numbers and booleans as little-endian elements with −0.0 as 0.0
        and every NaN as the quiet NaN, strings as u32 length and UTF-8 bytes (null: length 0xFFFFFFFF, no bytes).
        """
        return self._write(row)

    def _with_others_examined(self, values: Row) -> Row:
        """Take the plain values as they are, and examine the rest: those with a shape, those that may be missing."""
        row = list(values)
        for index, examine in self._others:
            row[index] = examine(row[index])
        return tuple(row)

    def _refuse_names(self, inputs: Mapping[Any, Any]) -> NoReturn:
        for name in self._names:
            if name not in inputs:
                raise InvalidInput(name, "missing")
        unknown = next((name for name in inputs if name not in self._names), "")
        raise InvalidInput(str(unknown)[:MAX_NAME], f"unknown input; the model takes {_listing(self._names)}")

    # -- where a signature comes from and goes to ----------------------------------------------------------

    @classmethod
    def infer(cls, example: Any) -> Signature:
        """Read the signature off example rows.

        ``example`` holds rows along axis 0: an array (one input ``x``), a DataFrame or a mapping of columns (one
        input per column), or a list of row mappings. An input is nullable when its example holds a missing value. Of a
        DataFrame it is noted what the missing strings of a column are, where all of them are the same.
        Raises ``InvalidInput`` naming the column that has no servable type.
        """
        fields = {name: (infer_field(name, column), column) for name, column in columns_of(example).items()}
        return cls(with_mark(*each) if is_frame(example) else each[0] for each in fields.values())

    def rows_of(self, example: Any, limit: int | None = None) -> list[Row]:
        """Return up to ``limit`` rows of an example (of any form that :meth:`infer` takes), validated."""
        columns = columns_of(example)
        count = len(next(iter(columns.values())))
        picked = range(count if limit is None else min(count, limit))
        return [self.validate({name: plain(column[i]) for name, column in columns.items()}) for i in picked]

    def record(self, row: Row) -> dict[str, Json]:
        """Return a validated row as a request would carry it: plain JSON values, NaN as null."""
        return {name: json_value(value) for name, value in zip(self._names, row, strict=True)}

    def to_json(self) -> Json:
        """Return the JSON form that the registry keeps."""
        return {"inputs": [_document(field) for field in self.inputs]}

    @classmethod
    def from_json(cls, document: Json) -> Signature:
        """Read the form that :meth:`to_json` wrote."""
        return cls(Field(**field) for field in document["inputs"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.inputs == other.inputs

    def __hash__(self) -> int:
        return hash(self.inputs)

    def __repr__(self) -> str:
        return f"Signature({', '.join(f'{field.name}: {field}' for field in self.inputs)})"


def _document(field: Field) -> Json:
    document = dataclasses.asdict(field) | {"shape": list(field.shape)}
    if field.missing is None:
        del document["missing"]  # most inputs have none, and readers of an older release know of none
    return document


def _listing(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
