"""Converting a model at registration, and proving on real rows that what comes out answers as the original does.

Each way that the converter offers is tried in turn, and the first one whose answers agree is taken. Two answers agree
when their labels are equal and their numbers differ by at most ``TOLERANCE``, relatively or absolutely.

A tree compares an input with a threshold. Where the two are the same up to the last digit of a float32, a model that
computes in single precision can take the other branch and answer something else altogether. Such a row is told by the
original itself: given the same inputs, rounded to float32, it answers as the converted model does. Of these there may
be ``MOST_AT_THRESHOLDS`` of the rows; a row that differs for any other reason refuses the conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from modelserve import plugins
from modelserve.errors import InvalidInput, MissingDependency, ModelServeError
from modelserve.ports import Converter, Framework, Model, SavedModel
from modelserve.registry.answers import answer_to, answers_of
from modelserve.registry.proof import require_same_as_given
from modelserve.signature import Signature
from modelserve.types import Array, Columns, Json, Row, row_count

TOLERANCE: Final = 1e-5
MOST_AT_THRESHOLDS: Final = 0.001
MOST_ROWS: Final = 100_000
_CHUNK: Final = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a converted model compares with its original on ``rows`` rows.

    ``equal_labels`` is how many rows have the same labels (answers that are no floats; all of them in a regression),
    ``largest_difference`` the largest absolute difference of two floats, ``differing`` how many rows do not agree, and
    ``at_thresholds`` how many of those do so only because a float32 decides otherwise.
    """

    rows: int
    equal_labels: int
    largest_difference: float
    differing: int
    at_thresholds: int

    @property
    def holds(self) -> bool:
        """Whether the converted model may stand in for the original."""
        return self.differing == self.at_thresholds <= MOST_AT_THRESHOLDS * self.rows


Proven = tuple[Framework, SavedModel, list[Json] | None, Mapping[str, Json] | None]
"""The adapter that serves a model, where it lies, its answers to the example, and the report of a conversion."""


def converted(  # noqa: PLR0917  # each is a part of one registration
    adapter: Framework,
    converter: Converter,
    model: Any,
    folder: Path,
    options: Mapping[str, Json],
    signature: Signature,
    example: Any,
    rows: list[Row],
    baseline: Any,
) -> Proven:
    """Convert a live model in the first way that agrees with it. Raises ``InvalidInput`` when none does."""
    if isinstance(model, str | Path):
        raise InvalidInput("optimize", "give the fitted model itself: a file cannot be compared with what comes out")
    if not rows:
        raise InvalidInput("example", "a conversion is proven on example rows; pass example=X[:4]")
    proven_on = rows + _baseline_rows(signature, baseline)
    _require_gaps(signature, proven_on)
    original = adapter.wrap(model, {name: options.get(name) for name in ("method", "missing_strings")})
    for given in (example,) if baseline is None else (example, baseline):
        require_same_as_given(original, original, signature, given, options["missing_strings"])
    serving = plugins.framework(converter.framework)
    wanted = [answer_to(original, columns) for columns in _chunks(signature, proven_on)]
    failures: list[str] = []
    for saved in converter.convert(model, folder, options, signature.stack(rows)):
        try:
            candidate = serving.load(saved.path, saved.format, saved.load_options)
            agreement = _compare(original, candidate, _chunks(signature, proven_on), wanted)
        except MissingDependency:
            raise
        except ModelServeError as error:
            failures.append(f"{saved.path.stem}: {error}")
            continue
        if agreement.holds:
            report = dataclasses.asdict(agreement) | {
                "to": saved.format,
                "way": saved.path.stem,
                "tolerance": TOLERANCE,
            }
            return serving, saved, answers_of(candidate, signature, rows), report
        failures.append(f"{saved.path.stem}: {_in_words(agreement)}")
    raise InvalidInput("optimize", f"no converted model answers as the original does: {'; '.join(failures)}")


def _baseline_rows(signature: Signature, baseline: Any) -> list[Row]:
    try:
        return [] if baseline is None else signature.rows_of(baseline, MOST_ROWS)
    except InvalidInput as error:
        raise error.within("baseline") from error


def _require_gaps(signature: Signature, rows: Sequence[Row]) -> None:
    """Refuse to prove a model on rows without the missing values that it may be sent."""
    for i, field in enumerate(signature.inputs):
        if field.nullable and not any(_has_gap(row[i]) for row in rows):
            problem = f"no row lacks a value of {field.name!r}, which may be missing in a request; give some that do"
            raise InvalidInput("baseline", problem)


def _has_gap(value: Any) -> bool:
    return any(part is None or part != part for part in np.asarray(value, dtype=object).flat)  # noqa: PLR0124  # NaN


def _chunks(signature: Signature, rows: Sequence[Row]) -> Iterator[Columns]:
    return (signature.stack(rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK))


# -- comparing ---------------------------------------------------------------------------------------------


def _compare(original: Model, candidate: Model, chunks: Iterator[Columns], wanted: Sequence[Columns]) -> Agreement:
    parts = [
        _compare_chunk(original, columns, expected, answer_to(candidate, columns))
        for columns, expected in zip(chunks, wanted, strict=True)
    ]
    return Agreement(
        rows=sum(part.rows for part in parts),
        equal_labels=sum(part.equal_labels for part in parts),
        largest_difference=max(part.largest_difference for part in parts),
        differing=sum(part.differing for part in parts),
        at_thresholds=sum(part.at_thresholds for part in parts),
    )


def _compare_chunk(original: Model, columns: Columns, wanted: Columns, found: Columns) -> Agreement:
    rows = row_count(columns)
    differing = np.flatnonzero(~_same(wanted, found, rows))
    return Agreement(
        rows=rows,
        equal_labels=int(_same(_labels(wanted), found, rows).sum()),
        largest_difference=_largest_difference(wanted, found),
        differing=len(differing),
        at_thresholds=_at_thresholds(original, _taken(columns, differing), _taken(found, differing)),
    )


def _at_thresholds(original: Model, columns: Columns, found: Columns) -> int:
    """Count the rows that the original answers likewise once their inputs are rounded to float32."""
    rows = row_count(columns)
    return int(_same(answer_to(original, _rounded(columns)), found, rows).sum()) if rows else 0


def _rounded(columns: Columns) -> Columns:
    return {
        name: column.astype(np.float32).astype(column.dtype) if column.dtype.kind == "f" else column
        for name, column in columns.items()
    }


def _taken(columns: Columns, places: Array) -> Columns:
    return {name: column[places] for name, column in columns.items()}


def _same(wanted: Columns, found: Columns, rows: int) -> npt.NDArray[np.bool_]:
    """Tell of each row whether all that is wanted was found."""
    same = np.ones(rows, dtype=bool)
    for name, column in wanted.items():
        other = found.get(name)
        if other is None or other.shape != column.shape or not _comparable(column, other):
            return np.zeros(rows, dtype=bool)
        equal = _close(column, other) if column.dtype.kind == "f" else np.asarray(column == other, dtype=bool)
        same &= equal.reshape(rows, -1).all(axis=1)
    return same


def _comparable(wanted: Array, found: Array) -> bool:
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
    return found.dtype.kind in kinds.get(wanted.dtype.kind, "OU")


def _close(wanted: Array, found: Array) -> npt.NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):  # infinities are equal or not; their difference is of no interest
        allowed = np.maximum(TOLERANCE * np.maximum(np.abs(wanted), np.abs(found)), TOLERANCE)
        near = np.isfinite(wanted) & np.isfinite(found) & (np.abs(wanted - found) <= allowed)
    return np.asarray(near | (wanted == found) | (np.isnan(wanted) & np.isnan(found)))


def _labels(wanted: Columns) -> Columns:
    return {name: column for name, column in wanted.items() if column.dtype.kind != "f"}


def _largest_difference(wanted: Columns, found: Columns) -> float:
    largest = 0.0
    for name, column in wanted.items():
        other = found.get(name)
        if (
            column.dtype.kind == "f"
            and other is not None
            and other.shape == column.shape
            and _comparable(column, other)
        ):
            both = np.isfinite(column) & np.isfinite(other)
            largest = max(largest, float(np.abs(column[both] - other[both]).max(initial=0.0)))
    return largest


def _in_words(agreement: Agreement) -> str:
    return (
        f"{agreement.differing} of {agreement.rows} rows differ by more than {TOLERANCE:g} "
        f"(largest difference {agreement.largest_difference:.3g}), {agreement.at_thresholds} of them because a float32 "
        f"decides otherwise; at most {MOST_AT_THRESHOLDS:.1%} may, and none for another reason"
    )
