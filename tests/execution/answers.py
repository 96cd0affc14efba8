"""Models that answer in every form there is, for both kinds of replicas alike. Importable in a worker."""

from __future__ import annotations

import datetime as dt
import enum
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from modelserve.ports import Model
from modelserve.testing.misbehaving import Misbehaving
from modelserve.types import SAFE, SOLE_OUTPUT, Columns, Json, Runtime


class Answering(Misbehaving):
    """Loads the models below: ``described`` and ``cases``, and ``echo`` of :class:`Misbehaving`."""

    def load(
        self,
        path: Path,
        format: str,  # noqa: A002
        load_options: Mapping[str, Json],
        runtime: Runtime = SAFE,
    ) -> Model:
        """Make the model named ``format``."""
        models: dict[str, Model] = {"described": Described(), "cases": _Cases()}
        return models[format] if format in models else super().load(path, format, load_options, runtime)


class Described:
    """Answers each column with what it is and holds, exactly, as one string per row."""

    def infer(self, columns: Columns) -> Columns:
        return {name: np.array([_described(row) for row in column], dtype=object) for name, column in columns.items()}


def _described(row: Any) -> str:
    array = np.asarray(row)
    return f"{array.dtype} {array.shape} {array.tolist()!r}"


class _Cases:
    """Answers with the case of which ``x`` is the number."""

    def infer(self, columns: Columns) -> Columns:
        answer: Columns = CASES[int(columns["x"][0])].answer(len(columns["x"]))
        return answer


class Refused(NamedTuple):
    """What the error says."""

    problem: str


class Case(NamedTuple):
    """An answer to n rows, and what each row's caller gets."""

    name: str
    answer: Callable[[int], Any]
    expected: Any


class _Level(enum.IntEnum):
    HIGH = 3


class _Plan(enum.StrEnum):
    PRO = "pro"


class _Pair(NamedTuple):
    left: int
    right: str


def _each(value: Any) -> Callable[[int], Columns]:
    """Answer every row with one Python value."""

    def answer(rows: int) -> Columns:
        column = np.empty(rows, dtype=object)
        for i in range(rows):
            column[i] = value
        return {SOLE_OUTPUT: column}

    return answer


def _array(row: Any, dtype: Any = None) -> Callable[[int], Columns]:
    """Answer every row with one row of an array."""
    return lambda rows: {SOLE_OUTPUT: np.array([row] * rows, dtype=dtype)}


def _masked(rows: int) -> Columns:
    return {SOLE_OUTPUT: np.ma.MaskedArray(np.tile([1.5, 2.5], (rows, 1)), [[False, True]] * rows)}


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


_POINT: Final = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
_DAY: Final = dt.date(2024, 1, 31)
_NO_FORM: Final = "no JSON form"
_TOO_LONG: Final = Refused(_NO_FORM) if np.longdouble(1).itemsize > 8 else 1.0  # it is a double on some machines

CASES: Final[list[Case]] = [
    # arrays
    Case("bool", _array(np.True_), expected=True),
    *(Case(name, _array(np.iinfo(name).max, name), int(np.iinfo(name).max)) for name in ("int8", "int64", "uint64")),
    *(Case(f"least {name}", _array(np.iinfo(name).min, name), int(np.iinfo(name).min)) for name in ("int8", "int64")),
    Case("float16", _array(0.1, "float16"), float(np.float16(0.1))),
    Case("float32", _array([0.1, -0.0], "float32"), [float(np.float32(0.1)), -0.0]),
    Case("special floats", _array([np.nan, np.inf, -np.inf, 5e-324]), [np.nan, np.inf, -np.inf, 5e-324]),
    Case("big-endian", _array([1, -2], ">i4"), [1, -2]),
    Case("big-endian strings", _array("naïve", ">U7"), "naïve"),
    Case("strided", lambda rows: {SOLE_OUTPUT: np.arange(12.0 * rows).reshape(rows, 12)[:, ::6] * 0 + 1}, [1.0, 1.0]),
    Case("strings", _array(["a", "", "\N{SNOWMAN}\U0001f600"]), ["a", "", "\N{SNOWMAN}\U0001f600"]),
    Case("strings with NUL", _array("a\0b"), "a\0b"),
    Case("empty strings", lambda rows: {SOLE_OUTPUT: np.ndarray(rows, "U0")}, ""),
    Case("variable strings", _array(["a", "\N{SNOWMAN}"], np.dtypes.StringDType()), ["a", "\N{SNOWMAN}"]),
    Case("no elements", lambda rows: {SOLE_OUTPUT: np.zeros((rows, 0))}, []),
    Case("masked", _masked, [1.5, None]),
    Case("not masked", lambda rows: {SOLE_OUTPUT: np.ma.MaskedArray(np.ones(rows))}, 1.0),
    Case("matrix", lambda rows: {SOLE_OUTPUT: np.ones((rows, 2)).view(np.matrix)}, [1.0, 1.0]),
    Case("several", lambda rows: {"a": np.ones(rows), "b": np.full((rows, 2), "x")}, {"a": 1.0, "b": ["x", "x"]}),
    # objects
    Case("None", _each(None), None),
    Case("Python scalars", _each([True, 2, 3.5, "four", None, -0.0]), [True, 2, 3.5, "four", None, -0.0]),
    Case("NumPy scalars", _each([np.True_, np.int8(2), np.float32(0.5), np.str_("s")]), [True, 2, 0.5, "s"]),
    Case("a list of one", _each([7]), [7]),
    Case("lists of one length", _each([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    Case("ragged lists", _each([[1], [], [2, "three"]]), [[1], [], [2, "three"]]),
    Case("tuples", _each((1, (2, _Pair(3, "x")))), [1, [2, [3, "x"]]]),
    Case("a shaped column", _array([["a", None], [1, 2.5]], object), [["a", None], [1, 2.5]]),
    Case("arrays in objects", _each({"v": np.array([[1, 2]], "int16"), "s": np.array("x")}), {"v": [[1, 2]], "s": "x"}),
    Case("object arrays in objects", _each([np.array([None, {"a": np.int8(1)}], object)]), [[None, {"a": 1}]]),
    Case("masked in objects", _each(np.ma.MaskedArray([1, 2], [False, True])), [1, None]),
    Case("special floats in objects", _each({"v": [np.nan, -np.inf]}), {"v": [np.nan, -np.inf]}),
    Case("ordered mappings", _each(OrderedDict(b=1, a={np.str_("k"): ()})), {"b": 1, "a": {"k": []}}),
    Case("subclasses", _each([_Level.HIGH, _Plan.PRO]), [3, "pro"]),
    Case("extremes", _each([2**64 - 1, -(2**63)]), [2**64 - 1, -(2**63)]),
    Case("strings in objects", _each(["", "a\0b", "\U0001f600"]), ["", "a\0b", "\U0001f600"]),
    Case("deep", _each(_nested(200)), _nested(200)),
    # what has no JSON form
    Case("keys that are numbers", _each({1: 2}), Refused("the key 1 is no string")),
    Case("whole numbers too large", _each(2**64), Refused(_NO_FORM)),
    Case("lone surrogates", _array("\ud800"), Refused(_NO_FORM)),
    Case("lone surrogates in objects", _each(["\udfff"]), Refused(_NO_FORM)),
    Case("beyond Unicode", lambda n: {SOLE_OUTPUT: np.full(n, 2**21, "u4").view("U1")}, Refused(_NO_FORM)),
    Case("a surrogate in a name", lambda rows: {"\ud800": np.ones(rows)}, Refused("no string of characters")),
    Case("outputs named by numbers", lambda rows: {0: np.ones(rows)}, Refused("named an output 0")),
    Case("complex", _array(1j), Refused(_NO_FORM)),
    Case("long doubles", _array(1.0, np.longdouble), _TOO_LONG),
    Case("long doubles in objects", _each(np.longdouble(1)), _TOO_LONG),
    Case("bytes", _array(b"a"), Refused(_NO_FORM)),
    Case("bytes in objects", _each(b"a"), Refused(_NO_FORM)),
    Case("dates", _array("2024-01-31", "datetime64[D]"), Refused(_NO_FORM)),
    Case("dates in objects", _each([np.datetime64(1, "ns")]), Refused(_NO_FORM)),
    Case("durations", _array(1, "timedelta64[s]"), Refused(_NO_FORM)),
    Case("Python dates", _each(_DAY), Refused("a date has none")),
    Case("records", lambda rows: {SOLE_OUTPUT: np.repeat(_POINT, rows)}, Refused(_NO_FORM)),
    Case("records in objects", _each(_POINT[0]), Refused(_NO_FORM)),
    Case("sets", _each({1}), Refused("a set has none")),
    Case("objects of no kind", _each(object()), Refused("an? object has none")),
    Case("endless", _each(_endless()), Refused(_NO_FORM)),
    Case("too deep", _each(_nested(300)), Refused(_NO_FORM)),
    # what is no answer
    Case("a Python scalar", lambda _: {SOLE_OUTPUT: 1.0}, Refused("a float in 'output'")),
    Case("a list", lambda rows: {SOLE_OUTPUT: ["a"] * rows}, Refused("a list in 'output'")),
    Case("a mapping", lambda rows: {SOLE_OUTPUT: {"a": np.ones(rows)}}, Refused("a dict in 'output'")),
    Case("no mapping", np.ones, Refused("a ndarray, not columns")),
    Case("no columns", lambda _: {}, Refused("no column")),
    Case("one row more", lambda rows: {SOLE_OUTPUT: np.ones(rows + 1)}, Refused("rows for")),
    Case("a single value", lambda _: {SOLE_OUTPUT: np.array(1.0)}, Refused("a single value for")),
]
