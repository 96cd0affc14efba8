"""A look at a large JSON text before it is parsed: how much it holds, and where it can be cut. In steps.

The text need not be well-formed. Where it is, the counts are exact; where it is not, parsing its slices says so.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from modelserve.turns import Steps
from modelserve.types import Array

WINDOW: Final = 128 * 1024
"""Bytes that one step looks at, and that a slice has at least."""
ROOT: Final = b"["
"""What is open before the text begins: it is read as the only element of a list."""
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_STRUCTURAL: Final = np.isin(np.arange(256), list(b"{}[],"))
_OPENS: Final = np.isin(np.arange(256), list(b"{["))
_CLOSES: Final = np.isin(np.arange(256), list(b"}]"))


class Malformed(ValueError):
    """The text is not JSON."""


class Cut(NamedTuple):
    """A place between two members or elements: just behind a comma, or the text's end.

    ``open`` has the opening bracket of each list and object that is open there, outermost first, and ``floor`` is the
    smallest number of them since the cut before.
    """

    end: int
    open: bytes
    floor: int


class Scan:
    """What was found so far. ``depth`` is the greatest number of lists and objects in one another."""

    def __init__(self, text: bytes, window: int = WINDOW) -> None:
        self._text, self._window = text, window
        self._quotes = self._commas = 0
        self._inside = self._escaped = False
        self._open, self._floor = ROOT, 1
        self.containers = self.depth = 0
        self.cuts: list[Cut] = []

    @property
    def values(self) -> int:
        """How many values stand in lists and objects beside one another."""
        return self._commas + 1

    @property
    def strings(self) -> int:
        """How many strings there are, names included."""
        return self._quotes // 2

    def steps(self) -> Steps[None]:
        """Look at the whole text. Raises :class:`Malformed` for one that does not end what it begins."""
        for start in range(0, len(self._text), self._window):
            self._look(start)
            yield
        self._cut(len(self._text))
        if self._inside or self._open != ROOT:
            raise Malformed("it ends too early")

    def _look(self, start: int) -> None:
        part = np.frombuffer(self._text, np.uint8, min(self._window, len(self._text) - start), start)
        at = np.flatnonzero(_STRUCTURAL[part] & ~self._strings(part))
        kinds = part[at]
        commas = np.flatnonzero(kinds == _COMMA)
        self._commas += len(commas)
        last = int(commas[-1]) + 1 if len(commas) else 0
        self._follow(kinds[:last])
        if last:
            self._cut(start + int(at[last - 1]) + 1)
        self._follow(kinds[last:])

    def _strings(self, part: Array) -> Array:
        """Return which bytes stand inside of strings."""
        quotes = part == _QUOTE
        if self._escaped or _BACKSLASH in part:
            quotes &= ~self._escapes(part)
        self._quotes += int(np.count_nonzero(quotes))
        inside: Array = np.bitwise_xor.accumulate(quotes)
        if self._inside:
            inside = ~inside
        self._inside = bool(inside[-1])
        return inside

    def _escapes(self, part: Array) -> Array:
        """Return which bytes are escaped: every other one in a run of backslashes, and what follows an odd run."""
        slashes = part == _BACKSLASH
        slashes[0] &= not self._escaped
        at = np.flatnonzero(slashes)
        begins = np.diff(at, prepend=-2) != 1
        escaping = at[(at - np.maximum.accumulate(np.where(begins, at, 0))) % 2 == 0]
        escaped = np.zeros(len(part) + 1, np.bool_)
        escaped[escaping + 1] = True
        escaped[0] = self._escaped
        self._escaped = bool(escaped[-1])
        return escaped[:-1]

    def _follow(self, kinds: Array) -> None:
        """Go through brackets and commas that follow one another."""
        opens = _OPENS[kinds]
        depths = len(self._open) + np.cumsum(opens.astype(np.int32) - _CLOSES[kinds])
        if not len(depths):
            return
        self.containers += int(np.count_nonzero(opens))
        self.depth = max(self.depth, int(depths.max()) - len(ROOT))
        lowest = min(len(self._open), int(depths.min()))
        if lowest < len(ROOT):
            raise Malformed("it goes on after its end")
        self._floor = min(self._floor, lowest)
        stay_open = opens & (np.minimum.accumulate(depths[::-1])[::-1] == depths)
        self._open = self._open[:lowest] + kinds[stay_open].tobytes()

    def _cut(self, end: int) -> None:
        self.cuts.append(Cut(end, self._open, self._floor))
        self._floor = len(self._open)
