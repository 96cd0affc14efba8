"""What a model and a version may be called."""

from __future__ import annotations

import re
from typing import Final

from modelserve.errors import InvalidInput

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_RESERVED: Final = frozenset({"batch"})  # POST /predict/batch is a route of its own


def check_names(model_name: str, version: str) -> None:
    """Raise ``InvalidInput`` naming ``model_name`` or ``version`` unless both may be registered."""
    for field, text in (("model_name", model_name), ("version", version)):
        if not is_name(text):
            problem = (
                f"{text!r} is not a name; use 1 to 128 letters, digits, '.', '_', '+' or '-', "
                "the first a letter or digit"
            )
            raise InvalidInput(field, problem)
    if model_name in _RESERVED:
        raise InvalidInput("model_name", f"{model_name!r} is taken by a route of the HTTP face; choose another name")


def is_name(text: object) -> bool:
    """Tell whether a model or version could be registered under this text."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None
