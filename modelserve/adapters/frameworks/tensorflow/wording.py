"""What TensorFlow's errors say, without what they carry along."""

from __future__ import annotations

import re
from typing import Final

_MOST: Final = 300
_LEADING: Final = re.compile(r"\n\n|<stack traces unavailable>\n")
_TRAILING: Final = re.compile(
    r"\n\t \[\[|\n\nArguments received by|\n\nList of objects|\nThe op is created at"
    r"|\. (?:Full object config|Make sure custom classes|This carries a potential risk)"
)
_MARKS: Final = re.compile(r"\{\{function_node [^}]*\}\} ?|\x1b\[\d*m|Exception encountered: ")


def brief(error: BaseException) -> str:
    """Return the kind of an error and the one line that says what is wrong.

    TensorFlow puts stack traces before that line and the graph's nodes after it, Keras whole configurations.
    """
    said = _LEADING.split(_TRAILING.split(str(error))[0].strip())[-1].strip()
    line = _MARKS.sub("", said.partition("\n")[0])
    kind = f"{type(error).__name__}: "
    return f"{kind}{line.removeprefix(kind)}"[:_MOST]
