"""Parsing a large JSON text slice by slice, into what parsing it at once gives; long lists come in pieces.

A slice begins and ends at a comma. What is open there is opened before it and closed behind it, with a stand-in for
what is left out on either side of the comma, so that the slices are well-formed if and only if the text is.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, Final, TypeAlias

import numpy as np
import orjson

from modelserve.http.scan import ROOT, Cut, Malformed
from modelserve.signature.pieces import Pieces
from modelserve.turns import Steps
from modelserve.types import Array, Json

Container: TypeAlias = Pieces | dict[str, Any]

# No client can know these, and so none can use them as a name or as a string.
_BEFORE: Final = secrets.token_hex(16)
_AFTER: Final = secrets.token_hex(16)
_EXACT: Final = 2**53
_NUMBERS: Final = frozenset({int, float})


class Slices:
    """A text and the slices of it that were parsed. Free what they hold with :meth:`release`, in steps as well."""

    def __init__(self, text: bytes, cuts: Sequence[Cut], loads: Callable[[bytes], Json] = orjson.loads) -> None:
        self._text, self._cuts, self._loads = text, cuts, loads
        self._open: list[Container] = [Pieces()]
        self._held: list[Any] = [self._open[0].runs]  # type: ignore[union-attr]  # the root is a list

    def steps(self) -> Steps[Json]:
        """Parse the slices; return the document. Raises ``Malformed``."""
        root = self._open[0]
        for before, after in pairwise([Cut(0, b"", 0), *self._cuts]):
            self._take(before, after)
            yield
        if len(root) != 1:
            raise Malformed("it is not one value")
        return next(iter(root))

    def release(self) -> Steps[None]:
        """Empty the document, a slice at a time: a whole one takes as long to be freed as it took to be made."""
        for each in self._held:  # outer ones first: an inner one is freed in its own step, when no other holds it
            each.clear()
            yield

    def _take(self, before: Cut, after: Cut) -> None:
        level = max(after.floor, len(ROOT)) - 1  # of the outermost list or object that the slice has a part of
        part = self._parsed(before, after, level)
        if before.open:
            self._close(part, before.open[level:], level)
        del self._open[level + 1 :]
        if after.end == len(self._text):
            self._add(level, part)
            return
        name, last = _end_of(part, after.open[level:])
        self._add(level, part)
        if len(after.open) > level + 1:
            self._grow(level, name, last, after.open[level + 1 :])

    def _parsed(self, before: Cut, after: Cut, level: int) -> Any:
        is_first, is_last = not before.open, after.end == len(self._text)
        text = memoryview(self._text)[before.end - (not is_first) : after.end]
        opening = ROOT if is_first else _opening(before.open[level:])
        closing = b"]" if is_last else _closing(after.open[level:])
        try:
            return self._loads(b"".join((opening, text, closing)))
        except orjson.JSONDecodeError as error:
            problem = str(error).partition(": line ")[0]
            raise Malformed(f"{problem}, between its bytes {before.end} and {after.end}") from None

    def _close(self, part: Any, brackets: bytes, level: int) -> None:
        """Take the beginning of a part: the rest of what was open, which ends here, or its stand-in."""
        rest = part.pop(0) if type(part) is list else part.pop(_BEFORE)
        if len(brackets) > 1:
            self._close(rest, brackets[1:], level + 1)
            self._add(level + 1, rest)

    def _grow(self, level: int, name: str | None, part: Any, brackets: bytes) -> None:
        """Take what is opened in a slice and goes on in the next."""
        grown: Container = Pieces() if type(part) is list else {}
        self._held.append(grown.runs if isinstance(grown, Pieces) else grown)
        self._open.append(grown)
        self._put(level, name, grown)
        inner, last = _end_of(part, brackets)
        self._add(level + 1, part)
        if len(brackets) > 1:
            self._grow(level + 1, inner, last, brackets[1:])

    def _add(self, level: int, part: Any) -> None:
        """Add elements or members to what is open."""
        target = self._open[level]
        if not part:
            return
        if isinstance(target, Pieces):
            packed: Any = _packed_run(part)
            target.runs.append(packed)
        else:
            packed = _packed_members(part)
            target.update(packed)
        if not isinstance(packed, np.ndarray):
            self._held.append(packed)

    def _put(self, level: int, name: str | None, value: Any) -> None:
        target = self._open[level]
        if isinstance(target, Pieces):
            target.runs.append([value])
        elif name is not None:
            target[name] = value


def _opening(brackets: bytes) -> bytes:
    """Open what was open, with a stand-in for what came before in the innermost."""
    named = b'"%b":' % _BEFORE.encode()
    opened = b"".join(b"{" + named if each == ord("{") else b"[" for each in brackets)
    return opened + b"0"


def _closing(brackets: bytes) -> bytes:
    """Close what is open, with a stand-in for what comes next in the innermost."""
    after = b'"%b"' % _AFTER.encode()
    closed = b"".join(b"}" if each == ord("{") else b"]" for each in reversed(brackets))
    return (after + b":0" if brackets[-1:] == b"{" else after) + closed


def _end_of(part: Any, brackets: bytes) -> tuple[str | None, Any]:
    """Take the end of a part: what goes on in the next slice, with its name in an object, or its stand-in."""
    if type(part) is list:
        return None, part.pop()
    name = _AFTER if len(brackets) == 1 else next(key for key in part if _goes_on(part[key], brackets[1:]))
    return name, part.pop(name)


def _goes_on(value: Any, brackets: bytes) -> bool:
    """Whether a value ends in the stand-in: of two members of one name, the later has the place of the earlier."""
    innermost = len(brackets) == 1
    if type(value) is list:
        return bool(value) and (value[-1] == _AFTER if innermost else _goes_on(value[-1], brackets[1:]))
    if type(value) is not dict:
        return False
    return _AFTER in value if innermost else any(_goes_on(each, brackets[1:]) for each in value.values())


# -- what is kept of a slice: numbers as arrays, which the garbage collector need not follow -----------------


def _packed_run(run: list[Any]) -> list[Any] | Array:
    numbers = _numbers(run)
    return [_packed_members(each) if type(each) is dict else each for each in run] if numbers is None else numbers


def _packed_members(members: dict[str, Any]) -> dict[str, Any]:
    return {name: _packed_value(value) for name, value in members.items()}


def _packed_value(value: Any) -> Any:
    """Return nested lists of numbers as pieces; a flat list is one object, and stays one."""
    if type(value) is not list or not value or type(value[0]) is not list:
        return value
    numbers = _numbers(value)
    return value if numbers is None else Pieces(numbers)


def _numbers(value: list[Any]) -> Array | None:
    """Return lists of numbers, all in one shape, as an array that holds them exactly; None where there is none."""
    shape, level = [len(value)], value
    while type(level[0]) is list:
        if set(map(type, level)) != {list} or len(sizes := set(map(len, level))) > 1 or 0 in sizes:
            return None
        shape += sizes
        level = list(chain.from_iterable(level))
    kinds = set(map(type, level))
    if not kinds <= _NUMBERS:
        return None
    array = np.array(level, np.float64 if float in kinds else np.int64) if _is_exact(level, kinds) else None
    return None if array is None else array.reshape(shape)


def _is_exact(numbers: list[Any], kinds: set[type]) -> bool:
    return kinds == {float} or (min(numbers) > -_EXACT and max(numbers) < _EXACT)
