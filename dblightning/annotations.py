"""Annotations read from source: the kinds they allow, whether a plain value fits, and how messages call them."""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

from dblightning.signatures import alias

#: annotation text of one kind → what to call it
WORDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false", "None": "null"}
MAPPINGS, LISTS = ("dict", "Mapping"), ("list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Set", "set")


class Kind(NamedTuple):
    """One member of an annotation's union, and the module whose names it uses."""

    node: ast.expr
    module: str


def kinds_of(annotation: ast.expr, module: str) -> list[Kind]:
    """The members of a union, aliases resolved."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return kinds_of(ast.parse(annotation.value, mode="eval").body, module)
        except SyntaxError:
            return [Kind(annotation, module)]
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return kinds_of(annotation.left, module) + kinds_of(annotation.right, module)
    if isinstance(annotation, ast.Subscript):
        name = name_of(annotation.value)
        if name == "Optional":
            return [*kinds_of(annotation.slice, module), Kind(ast.Constant(None), module)]
        if name == "Union":
            members = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            return [each for member in members for each in kinds_of(member, module)]
    if isinstance(annotation, ast.Name) and annotation.id not in WORDS:
        target = alias(module, annotation.id)
        if target is not None:
            return kinds_of(*target)
    return [Kind(annotation, module)]


def name_of(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return ast.unparse(node).rpartition(".")[2]


def fits(kind: ast.expr, value: Any) -> bool:
    """Whether a value may be of a kind; True in doubt."""
    if isinstance(kind, ast.Constant):
        return value is kind.value or kind.value is not None
    if isinstance(kind, ast.Subscript):
        name = name_of(kind.value)
        if name == "Literal":
            return value in _literals(kind)
        if name in LISTS:
            return isinstance(value, list | tuple) or (isinstance(value, dict) and name not in ("list", "List"))
        if name in MAPPINGS:
            return isinstance(value, dict)
        return True
    word = name_of(kind)
    if word == "int":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if word == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if word == "bool":
        return isinstance(value, bool)
    if word == "str":
        return not isinstance(value, dict | list) and value is not None
    if word in LISTS:
        return isinstance(value, list)
    if word in MAPPINGS:
        return isinstance(value, dict)
    if word in ("Any", "object"):
        return True
    # a class: by path or as a mapping
    return value is not None and not isinstance(value, bool | int | float)


def _literals(kind: ast.Subscript) -> list[Any]:
    parts = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    return [each.value for each in parts if isinstance(each, ast.Constant)]


def words_of(kind: ast.expr) -> list[Any]:
    """The literals of a kind that is a choice."""
    return _literals(kind) if isinstance(kind, ast.Subscript) and name_of(kind.value) == "Literal" else []


def described(annotation: ast.expr, module: str) -> str:
    """The kinds that an annotation allows, in words."""
    words: list[str] = []
    for kind, _ in kinds_of(annotation, module):
        if isinstance(kind, ast.Subscript) and name_of(kind.value) == "Literal":
            words += [repr(each) for each in _literals(kind)]
        elif isinstance(kind, ast.Subscript) or name_of(kind) in (*LISTS, *MAPPINGS):
            name = name_of(kind.value if isinstance(kind, ast.Subscript) else kind)
            words.append("settings by name" if name in MAPPINGS else "a list")
        else:
            words.append(WORDS.get(ast.unparse(kind), f"a {name_of(kind)} by its class_path"))
    return " or ".join(dict.fromkeys(words))
