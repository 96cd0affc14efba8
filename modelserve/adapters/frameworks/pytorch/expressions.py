"""The expressions in an exported program: sizes, guards, and the layout of inputs and outputs.

PyTorch evaluates the first two as Python. They are parsed here, and let through when they are arithmetic on sizes.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Final

_MOST_CHARACTERS: Final = 10_000
_ARITHMETIC: Final = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.Load,
)
_SYMBOL: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_DECIMAL: Final = re.compile(r"-?[0-9.]{1,40}(?:e[+-]?[0-9]{1,3})?")
_POWERS: Final = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
_LARGEST: Final = 2**63
_LARGEST_EXPONENT: Final = 63
_ASSUMPTIONS: Final = {"positive", "negative", "nonnegative", "nonpositive", "integer", "real", "precision", "evaluate"}
_OF_SIZES: Final = frozenset(
    {
        *("Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling", "Rational", "Integer", "Float"),
        *("Equality", "Unequality", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
        *("StrictGreaterThan", "GreaterThan", "StrictLessThan", "LessThan"),
        *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
        *("LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"),
        *("IsNonOverlappingAndDenseIndicator", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
    }
)
_OF_GUARDS: Final = frozenset({"max", "min", "abs", "int", "float", "round", "Max", "Min", "Mod", "FloorDiv"})
_METHODS_OF_GUARDS: Final = {
    "L": {"size", "stride", "storage_offset"},
    "math": {"ceil", "floor", "trunc", "sqrt", "isnan"},
    "torch": {"sym_float", "sym_int", "sym_max", "sym_min", "sym_not"},
}
_CONTAINERS: Final = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_KEY: Final = re.compile(r"[A-Za-z0-9_. -]*")


def check_size(text: str) -> bool:
    """Tell whether a size is arithmetic on symbols and numbers: ``Mul(Integer(2), Symbol('s0', integer=True))``."""
    tree = _parsed(text)
    return tree is not None and _is_modest(tree) and _is_size(tree)


def check_guard(text: str) -> bool:
    """Tell whether a guard compares sizes of inputs: ``L['x'].size()[0] == 3``."""
    if any(character in text for character in '"\\#\n\r{}'):
        return False  # what would leave the sentence that PyTorch pastes the guard into
    tree = _parsed(text)
    return tree is not None and _is_modest(tree) and _is_guard(tree)


def check_layout(text: str) -> bool:
    """Tell whether inputs or outputs are laid out in plain tuples, lists and dicts with plain keys."""
    try:
        protocol, layout = json.loads(text)
        return protocol == 1 and _is_layout(layout)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def _parsed(text: str) -> ast.AST | None:
    if len(text) > _MOST_CHARACTERS or not text.isascii():
        return None
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_modest(tree: ast.AST) -> bool:
    """Tell whether an expression can be computed in no time: no large numbers, nor powers that make them."""
    powers = [node for node in ast.walk(tree) if _is_power(node)]
    return all(
        isinstance(node.value, str) or abs(node.value) <= _LARGEST
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str)
    ) and all(_is_small_power(node) for node in powers)


def _is_power(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(op=ast.Pow() | ast.LShift() | ast.RShift()):
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in _POWERS
    return False


def _is_small_power(node: ast.AST) -> bool:
    """Tell whether a power has a small number as its exponent, and no other power in its base."""
    match node:
        case ast.BinOp(left=base, right=exponent) | ast.Call(args=[base, exponent]):
            return _is_small(exponent) and not any(map(_is_power, ast.walk(base)))
    return False


def _is_small(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=int(value)):
            return abs(value) <= _LARGEST_EXPONENT
        case ast.UnaryOp(op=ast.USub(), operand=inner) | ast.Call(func=ast.Name(id="Integer"), args=[inner]):
            return _is_small(inner)
        case ast.Call(func=ast.Name(id="Rational"), args=args):
            return all(map(_is_small, args))
    return False


def _is_size(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, bool | int | float)
        case ast.Name(id=name):
            return _SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            return _SYMBOL.fullmatch(name) is not None and _are_assumptions(keywords)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(number))], keywords=keywords):
            return _DECIMAL.fullmatch(number) is not None and _are_assumptions(keywords)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return name in _OF_SIZES and all(map(_is_size, args)) and _are_assumptions(keywords)
    return isinstance(node, _ARITHMETIC) and all(map(_is_size, ast.iter_child_nodes(node)))


def _are_assumptions(keywords: list[ast.keyword]) -> bool:
    return all(
        each.arg in _ASSUMPTIONS and isinstance(each.value, ast.Constant) and isinstance(each.value.value, int)
        for each in keywords
    )


def _is_guard(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, bool | int | float)
        case ast.Subscript():
            return _is_input(node) or (_is_call_of_input(node.value) and _is_key(node.slice))
        case ast.Call(func=function, args=args, keywords=[]):
            return _is_call_of_input(node) or (_is_function(function) and all(map(_is_guard, args)))
        case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            return True
    return isinstance(node, _ARITHMETIC) and all(map(_is_guard, ast.iter_child_nodes(node)))


def _is_function(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _OF_GUARDS
        case ast.Attribute(value=ast.Name(id=("math" | "torch") as owner), attr=name):
            return name in _METHODS_OF_GUARDS[owner]
    return False


def _is_call_of_input(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]):
            return name in _METHODS_OF_GUARDS["L"] and _is_input(value)
    return False


def _is_input(node: ast.AST) -> bool:
    """Tell whether it is ``L['x']``, or a part of it: ``L['x'][0]['key']``."""
    match node:
        case ast.Subscript(value=value, slice=key):
            return _is_key(key) and (_is_input(value) or (isinstance(value, ast.Name) and value.id == "L"))
    return False


def _is_key(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=int()):
            return True
        case ast.Constant(value=str(key)):
            return _KEY.fullmatch(key) is not None
    return False


def _is_layout(layout: Any) -> bool:
    kind, context = layout["type"], layout["context"]
    if kind is None:
        return context is None and not layout["children_spec"]
    keys = json.loads(context)
    plain = keys is None or (isinstance(keys, list) and all(isinstance(key, int) or _is_word(key) for key in keys))
    return kind in _CONTAINERS and plain and all(map(_is_layout, layout["children_spec"]))


def _is_word(key: Any) -> bool:
    return isinstance(key, str) and _KEY.fullmatch(key) is not None
