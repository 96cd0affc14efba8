"""Whether what is served answers the caller's own rows as the model itself does.

On its way to a served model a row goes through a signature: a category becomes a string, a gap one of three marks, a
number another type. Each of these can change an answer, and a comparison behind the same way would not see it. So the
model is called on the rows in the form in which its owner has them, by the method that requests call.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.errors import InvalidInput
from modelserve.ports import AnswersAsGiven, Model
from modelserve.registry.answers import answers_of, in_json
from modelserve.signature import MARKS, Field, Signature, columns_of, marks_in
from modelserve.signature.batches import stack_column
from modelserve.signature.comparison import ABSOLUTE, outputs_match
from modelserve.signature.examination import plain
from modelserve.signature.forms import is_frame, taken, with_column
from modelserve.types import Array, Json, Row

_log = logging.getLogger("modelserve")
_MOST_ROWS: Final = 1024
_ENOUGH_S: Final = 20.0  # no more rows are compared after that: a model may take a second for each
_MOST_ELEMENTS: Final = 2**16
_MOST_ALONE: Final = 64
_FEW: Final = 8
_MOST_CATEGORIES: Final = 32
_MOST_BLAMED: Final = 64
_OF_LARGEST: Final = 1e-5
_USUAL_MARK: Final = "NaN"
_MARKS_OF_OBJECTS: Final = ("None", "NaN")  # a frame has pandas.NA in columns of its own type alone


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an example as their owner has them and as requests bring them, and their places in it."""

    given: Any
    validated: list[Row]
    places: list[int]

    def part(self, first: int, last: int) -> Rows:
        """Return the rows from ``first`` to before ``last``."""
        places = self.places[first:last]
        return Rows(taken(self.given, range(first, first + len(places))), self.validated[first:last], places)


def marks_to_try(signature: Signature, example: Any) -> Iterator[dict[str, str]]:
    """Give what may stand for a missing string in each input: what its field says, else what the example has.

    The null of a record may be None, or stand for the NaN of a frame that the model was fitted on: that comes second.
    """
    columns = {} if example is None else columns_of(example)
    stated = {field.name: field.missing for field in _gappy(signature) if field.missing is not None}
    found = {field.name: _sole_mark(columns.get(field.name)) for field in _gappy(signature)}
    yield {name: mark for name, mark in found.items() if mark is not None} | stated
    if not is_frame(example) and "None" in found.values():
        yield {name: _USUAL_MARK for name, mark in found.items() if mark is not None} | stated


def require_same_as_given(
    live: Model,
    served: Model,
    signature: Signature,
    example: Any,
    marks: Mapping[str, str],
    *,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Raise ``InvalidInput`` that names the row, and the column if it can be found, where the two answer differently.

    ``live`` is called on the rows of the ``example`` as they are, ``served`` on what a request would make of them: on
    up to 1,024 of them, and on each category of a frame's columns, as far as 20 s by ``now`` go. Rows that no request
    could bring are left out. Where the model does not answer rows in the form of the example, there is nothing to
    compare with. What a missing string is to the model has to be known, or make no difference.
    """
    if not isinstance(live, AnswersAsGiven):
        return
    rows = _servable(signature, example)
    if not rows.validated:
        return
    proof = _Proof(live, served, signature, marks)
    few, *more = _parts(rows)
    ends = now() + _ENOUGH_S
    for part in _in_time(chain([few], _of_each_category(signature, few), more), ends, now):
        if not proof.compare(part):  # one row that the model does not take speaks for no other
            for each in _one_by_one(part):
                proof.compare(each)
    for field in _gappy(signature):
        if field.name not in marks:
            _require_no_difference_of_marks(live, field, rows if now() < ends else few)


# -- the rows ----------------------------------------------------------------------------------------------


def _servable(signature: Signature, example: Any) -> Rows:
    """Return the rows of an example that requests could bring; of a long one, some from all over it."""
    columns = columns_of(example)
    count = len(next(iter(columns.values())))
    elements = sum(column[0].size if isinstance(column[0], np.ndarray) else 1 for column in columns.values())
    most = min(count, _MOST_ROWS, max(_FEW, _MOST_ELEMENTS // elements))
    kept: list[tuple[int, Row]] = []
    for place in np.linspace(0, count - 1, most).astype(int).tolist():
        try:
            kept.append((place, signature.validate({name: plain(column[place]) for name, column in columns.items()})))
        except InvalidInput:
            continue
    places = [place for place, _ in kept]
    return Rows(taken(example, places), [row for _, row in kept], places)


def _parts(rows: Rows) -> Iterator[Rows]:
    """Give the rows in parts, each as long as all before it: how long one takes shows before the next is begun."""
    first, last = 0, _FEW
    while first < len(rows.places):
        yield rows.part(first, last)
        first, last = last, 2 * last


def _in_time(parts: Iterable[Rows], ends: float, now: Callable[[], float]) -> Iterator[Rows]:
    """Give the first part, and the others until time is up."""
    compared = 0
    for part in parts:
        if compared and now() >= ends:
            _log.warning(
                "shortened: the model is slow, and was compared with what is served on %d rows of the example", compared
            )
            return
        yield part
        compared += len(part.places)


def _one_by_one(rows: Rows) -> Iterator[Rows]:
    for i in range(min(_MOST_ALONE, len(rows.places))):
        yield Rows(taken(rows.given, [i]), [rows.validated[i]], [rows.places[i]])


def _of_each_category(signature: Signature, rows: Rows) -> Iterator[Rows]:
    """Give a few rows of a frame again with each category that one of its columns could have: a few rows show few."""
    if not is_frame(rows.given):
        return
    few = taken(rows.given, range(min(_FEW, len(rows.places))))
    for name in few.columns:
        for category in getattr(few[name].dtype, "categories", ())[:_MOST_CATEGORIES]:
            column = few[name].copy()
            column.iloc[:] = category
            varied = _servable(signature, few.assign(**{name: column}))
            yield dataclasses.replace(varied, places=[rows.places[place] for place in varied.places])


def _gappy(signature: Signature) -> list[Field]:
    return [field for field in signature.inputs if field.dtype == "string" and field.nullable]


def _sole_mark(column: Array | None) -> str | None:
    marks = frozenset() if column is None else marks_in(column)
    return next(iter(marks)) if len(marks) == 1 else None


# -- comparing ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Proof:
    """A model as its owner has it and as it would be served, and what a missing string is in each input."""

    live: AnswersAsGiven
    served: Model
    signature: Signature
    marks: Mapping[str, str]

    def compare(self, rows: Rows) -> bool:
        """Raise ``InvalidInput`` for the first row that the two answer differently; tell whether they were compared."""
        wanted = _answers_as_given(self.live, rows.given, len(rows.places))
        if wanted is None:
            return False
        found = answers_of(self.served, self.signature, rows.validated)
        for i, (own, other) in enumerate(zip(wanted, found, strict=True)):
            if not _same(own, other):
                problem = f"row {rows.places[i]} of the example is answered {own!r:.80} by the model itself, "
                raise self._refusal(f"{problem}and {other!r:.80} as it would be served", rows, i, own)
        return True

    def _refusal(self, problem: str, rows: Rows, i: int, own: Json) -> InvalidInput:
        changed = self._changed_column(taken(rows.given, [i]), rows.validated[i], own)
        if changed is None:
            fix = "give the example as requests will bring it: plain numbers, strings and booleans"
            return InvalidInput("example", f"{problem}; {fix}")
        field, value = changed
        fix = "fit the model on that, and give it in the example"
        if field.dtype == "string" and not isinstance(value, str):
            fix = "say what the model was fitted on: Field(..., missing=)"
        return InvalidInput(field.name, f"{problem}: there the model gets {value!r:.40} of type {field}; {fix}")

    def _changed_column(self, given: Any, row: Row, own: Json) -> tuple[Field, Any] | None:
        """Find the column that changes the answer once it is as it would be served."""
        for field, value in list(zip(self.signature.inputs, row, strict=True))[:_MOST_BLAMED]:
            column = self._as_served(field, value)
            answers = _answers_as_given(self.live, with_column(given, field.name, column), 1)
            if answers is None or not _same(own, answers[0]):
                return field, column[0]
        return None

    def _as_served(self, field: Field, value: Any) -> Array:
        if value is None:
            return _blank(1, self.marks.get(field.name, _USUAL_MARK))
        return stack_column(field, (value,))


def _same(own: Json, other: Json) -> bool:
    """Whether two answers to a row are the same. Its numbers are as precise as the largest of them: sums cancel out."""
    return outputs_match(own, other, absolute=max(ABSOLUTE, _OF_LARGEST * _largest(own)))


def _largest(answer: Json) -> float:
    if isinstance(answer, float):
        return abs(answer)
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list) else ()
    return max(map(_largest, parts), default=0.0)


def _answers_as_given(live: AnswersAsGiven, given: Any, rows: int) -> list[Json] | None:
    """Return the model's own answers; None where it does not answer rows in this form, one for each."""
    try:
        return in_json(live.answer_as_given(given), rows)
    except Exception:  # noqa: BLE001  # a model raises anything
        return None


# -- what is missing ---------------------------------------------------------------------------------------


def _require_no_difference_of_marks(live: AnswersAsGiven, field: Field, rows: Rows) -> None:
    """Refuse an input whose missing strings could be one thing or another, where that changes the model's answers.

    A mark that the model does not take at all is none.
    """
    dtype = rows.given[field.name].dtype if is_frame(rows.given) else None
    if field.shape or hasattr(dtype, "categories"):
        return
    marks, count = MARKS if str(dtype) == "string" else _MARKS_OF_OBJECTS, len(rows.places)
    answers = [
        _answers_as_given(live, with_column(rows.given, field.name, _blank(count, mark)), count) for mark in marks
    ]
    usual = answers[marks.index(_USUAL_MARK)]
    if any(each is not None and not outputs_match(usual, each) for each in answers):
        problem = (
            f"it may be missing, and the model tells {' and '.join(marks)} apart: pass an example with a gap as it was "
            f"fitted on, of one kind in a column, or signature= with Field({field.name!r}, ..., missing={marks[0]!r})"
        )
        raise InvalidInput(field.name, f"{problem} or missing={_USUAL_MARK!r}")


def _blank(rows: int, mark: str) -> Array:
    column = np.empty(rows, dtype=object)
    column[:] = {"None": None, "NaN": math.nan}[mark] if mark != "NA" else plugins.require("pandas").NA
    return column
