"""How much a request to a model can hold, and the least it has to: in JSON, before any of it is parsed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple, Self

import orjson

from modelserve.errors import InvalidInput
from modelserve.signature.fields import Field

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
"""The largest body that is read, unless a mount says otherwise."""
_ENVELOPE: Final = len(b'{"inputs":}')
_LEAST: Final = {"string": len(b'""'), "bool": len(b"true")}


class Extent(NamedTuple):
    """What one row has at most: lists and objects, values beside one another, strings. And its least bytes."""

    containers: int
    values: int
    strings: int
    least_bytes: int

    @classmethod
    def of(cls, fields: Iterable[Field], optional: Iterable[Field] = (), keys: Iterable[str] = ()) -> Self:
        """Return the extent of a row that has some fields, may have others, and is completed by keys of entities."""
        needed, others, entities = tuple(fields), tuple(optional), tuple(keys)
        every = needed + others
        strings = sum(math.prod(field.shape) for field in every if field.dtype == "string")
        return cls(
            containers=1 + sum(map(_lists, every)),
            values=sum(math.prod(field.shape) for field in every) + len(entities),
            strings=strings + len(every) + 2 * len(entities),  # names are strings, and so may keys be
            least_bytes=len(b"{}") + sum(map(_least_bytes, needed)) + max(0, len(needed) - 1),
        )

    def within(self, size: int, most_rows: int) -> Extent:
        """Return what a request of this many bytes has at most, in all its rows."""
        rows = max(1, min(most_rows, size // self.least_bytes))
        return Extent(
            containers=rows * self.containers + 2,  # around the rows: the body and its list
            values=rows * self.values,
            strings=rows * self.strings + 1,
            least_bytes=self.least_bytes + _ENVELOPE,
        )


def refuse_unaskable(fields: Iterable[Field], max_body_bytes: int) -> None:
    """Raise ``InvalidInput`` unless a request of one row can be as short as ``max_body_bytes``."""
    inputs = tuple(fields)
    least = Extent.of(inputs).least_bytes + _ENVELOPE
    if least > max_body_bytes:
        largest = max(inputs, key=_least_bytes)
        problem = (
            f"one row has at least {least} bytes as JSON, and a request has at most {max_body_bytes} (max_body_bytes), "
            f"so the model could never be asked over HTTP; {largest.name!r} ({largest}) is the largest input"
        )
        raise InvalidInput("signature", problem)


def _lists(field: Field) -> int:
    """Return how many lists the value of a field consists of."""
    return sum(math.prod(field.shape[:depth]) for depth in range(len(field.shape)))


def _least_bytes(field: Field) -> int:
    """Return how short a field can be, with its name."""
    elements = math.prod(field.shape)
    value = elements * _LEAST.get(field.dtype, 1) + (elements - 1) + 2 * _lists(field)
    return len(orjson.dumps(field.name)) + len(b":") + value
