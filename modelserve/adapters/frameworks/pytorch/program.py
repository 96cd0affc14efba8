"""The JSON of an exported program, held against what PyTorch writes into it.

Much of it is code when PyTorch reads it: shapes are evaluated as expressions, guards are executed as Python, names are
pasted into a generated function, and a node may call any function that can be reached from the module ``torch``. So
nothing is let through because it looks harmless, only what is known: operators of PyTorch, arithmetic on sizes, names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.expressions import check_guard, check_layout, check_size
from modelserve.errors import ArtifactUnsafe

_NAME: Final = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]*)?")
_PATH: Final = re.compile(r"[A-Za-z0-9_.@ :/+-]*")
_TEXT: Final = re.compile(r"[A-Za-z0-9_.,:;@ ()<>\[\]=|/*+-]*")
_NUMBER: Final = re.compile(r"-?Infinity|NaN")

_OPERATOR: Final = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)
_LIBRARIES: Final = {"aten", "prims", "quantized_decomposed", "torchvision"}
_TOUCHES_FILES: Final = {"from_file", "save"}
_OF_SYMBOLS: Final = {"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
_BLOCKS: Final = {
    f"torch.ops.higher_order.{name}"
    for name in (
        "associative_scan",
        "cond",
        "map_impl",
        "out_dtype",
        "scan",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
}
_ON_SIZES: Final = {
    *(
        f"_operator.{name}"
        for name in (
            *("add", "and_", "eq", "floordiv", "ge", "gt", "le", "lshift", "lt", "mod", "mul", "ne", "neg", "or_"),
            *("pos", "pow", "rshift", "sub", "truediv"),
        )
    ),
    *(f"torch.{name}" for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "_sym_sqrt")),
    "math.ceil",
    "math.floor",
    "math.trunc",
}
_OBJECTS: Final = {"as_custom_obj", "custom_obj", "custom_obj_values"}
_MAPS: Final = {
    "as_string_to_argument",
    "config",
    "sym_bool_values",
    "sym_float_values",
    "sym_int_values",
    "tensor_values",
    "treespec_namedtuple_fields",
}
"""What is kept under names of the program's own choosing: there, ``metadata`` is the name of a tensor."""


def check_json(document: Any, key: str = "") -> None:
    """Raise ``ArtifactUnsafe`` for anything in a parsed document that PyTorch would not have written itself."""
    if isinstance(document, dict):
        if key in _CHECKS:
            _refuse(f"the {key}", "an object in place of a text")
        for name, value in document.items():
            _check_name(name)
            if key in _MAPS:
                check_json(value)
            else:
                _check_entry(name, value)
    elif isinstance(document, list):
        for value in document:
            check_json(value, key)
    elif isinstance(document, str):
        _check_string(key, document)


def _check_name(name: str) -> None:
    if not _is_path(name):
        _refuse("the name", name)


def _check_entry(name: str, value: Any) -> None:
    if name in _OBJECTS and value:
        raise ArtifactUnsafe("the exported program holds a pickled object; only raw tensors are loaded")
    if name == "use_pickle" and value is not False:
        raise ArtifactUnsafe("the exported program holds a pickled tensor; only raw tensors are loaded")
    if name == "metadata":
        _check_metadata(value)
    elif name == "range_constraints":
        _check_ranges(value)
    else:
        check_json(value, name)


def _check_metadata(value: Any) -> None:
    """Let through notes on where a node came from. PyTorch looks up the functions in them, but calls none."""
    if not isinstance(value, dict) or not all(isinstance(note, str) for note in value.values()):
        _refuse("the metadata", str(value))
    if not _is_text(value.get("source_fn_stack", "")):
        _refuse("the metadata", value["source_fn_stack"])


def _check_ranges(value: Any) -> None:
    """Let through bounds that are whole numbers; the sizes that they bound are only compared with each other."""
    bounds = [bound for each in value.values() for bound in each.values()] if isinstance(value, dict) else [value]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        _refuse("the range", str(bounds))


def _check_string(key: str, text: str) -> None:
    check = _CHECKS.get(key, _is_path)
    if not check(text):
        _refuse(f"the {key or 'value'}", text)


def _refuse(what: str, text: str) -> None:
    raise ArtifactUnsafe(
        f"the exported program could run code: {what} {text[:80]!r} is none that is known to be harmless; register "
        "the weights instead, with factory= and format='safetensors'"
    )


def _is_operator(target: str) -> bool:
    if target in _BLOCKS or target in _ON_SIZES:
        return True
    match = _OPERATOR.fullmatch(target)
    if match is None or any(part.startswith("__") and part.endswith("__") for part in match.groups()):
        return False
    return match[1] in _LIBRARIES and match[2] not in _TOUCHES_FILES and _is_of_tensors(*match.groups())


def _is_of_tensors(library: str, name: str, overload: str) -> bool:
    """Whether an operator takes or gives tensors; others set the state of the process, such as its random seed."""
    if name in _OF_SYMBOLS:
        return True
    packet = getattr(getattr(plugins.require("torch").ops, library), name, None)
    schema = getattr(getattr(packet, overload, None), "_schema", None)
    if schema is None:  # one that is not installed here: loading will say so
        return True
    return any("Tensor" in str(each.type) for each in (*schema.arguments, *schema.returns))


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _is_path(text: str) -> bool:
    return _PATH.fullmatch(text) is not None and not any(
        part.startswith("__") and part.endswith("__") and part for part in text.split(".")
    )


def _is_text(text: str) -> bool:
    return _TEXT.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


_CHECKS: Final[dict[str, Callable[[str], bool]]] = {
    "as_float": _is_number,
    "as_floats": _is_number,
    "as_name": _is_name,
    "as_operator": _is_operator,
    "as_string": _is_text,
    "as_strings": _is_text,
    "expr_str": check_size,
    "forward_arg_names": _is_name,
    "guards_code": check_guard,
    "in_spec": check_layout,
    "name": _is_name,
    "out_spec": check_layout,
    "target": _is_operator,
}
