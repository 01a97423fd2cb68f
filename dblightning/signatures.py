"""Arguments of a class, read from its source without importing it: for help and refusals that cannot wait for torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

#: how many re-exports and base classes are followed before giving up
MAX_DEPTH = 12


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A constructor's argument.

    Attributes:
        name: its name.
        annotation: its type, or None where the source has none.
        default: its default as source text; None where it is required.
        doc: its text in the docstring's ``Args``, on one line; "" where there is none.
        module: dotted name of the module that the annotation's names belong to.
    """

    name: str
    annotation: ast.expr | None
    default: str | None
    doc: str
    module: str


@dataclasses.dataclass(frozen=True)
class Signature:
    """A class's constructor.

    Attributes:
        path: dotted path of the class where it is defined.
        doc: first paragraph of its docstring, on one line.
        parameters: by name, in order.
        open: whether it takes arguments that its source does not name.
        fields: whether it is a dataclass, a group of settings.
    """

    path: str
    doc: str
    parameters: dict[str, Parameter]
    open: bool
    fields: bool = False


class NotFound(LookupError):
    """A dotted path that names nothing; the message says which part."""


class Unknowable(LookupError):
    """A dotted path whose target cannot be determined from source alone: importing it decides."""


def signature(path: str) -> Signature:
    """The constructor of a class, by its dotted path; re-exports are followed.

    >>> found = signature("dblightning.blending.DBKLA")
    >>> {name: each.default for name, each in found.parameters.items()}
    {'adapter': None, 'kl_scale': '1.0'}

    Raises:
        NotFound: no such module, or no such name in it.
        Unknowable: compiled, generated or dynamic code.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise Unknowable(f"{path!r} is not a dotted path")
    return _signature(module, name, MAX_DEPTH)


def alias(module: str, name: str) -> tuple[ast.expr, str] | None:
    """The right-hand side of ``name = …`` at the top of a module (a type alias, say), and the module it stands in.

    Imported names are followed; None where there is no such line.
    """
    for _ in range(MAX_DEPTH):
        try:
            tree = _tree(module)
        except LookupError:
            return None
        for node in _statements(tree):
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node.value, module
        found = _imported(module, tree, name)
        if found is None:
            return None
        module, name = found
    return None


def submodules(package: str) -> list[str]:
    """Names of a package's public modules."""
    file = _file(package)
    return sorted(each.stem for each in file.parent.glob("*.py") if not each.stem.startswith("_"))


def exports(module: str) -> dict[str, str]:
    """Public class names that a module defines or re-exports → their dotted path there."""
    tree = _tree(module)
    found = {node.name: f"{module}.{node.name}" for node in _statements(tree) if isinstance(node, ast.ClassDef)}
    for node in _statements(tree):
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                name = each.asname or each.name
                constant = name.isupper() and class_path(module, name) is None
                if name[0].isupper() and not constant and f"{node.module}".split(".")[0] == module.split(".")[0]:
                    found.setdefault(name, f"{module}.{name}")
    return {name: path for name, path in found.items() if not name.startswith("_")}


def class_path(module: str, name: str) -> str | None:
    """Definition of the class that a module calls ``name``; None if it cannot be determined."""
    try:
        return _signature(module, name, MAX_DEPTH).path
    except LookupError:
        return None


def group(parameter: Parameter) -> Signature | None:
    """The settings of a parameter that is a group of them (a dataclass of this package); None for any other."""
    if not isinstance(parameter.annotation, ast.Name):
        return None
    path = class_path(parameter.module, parameter.annotation.id)
    found = signature(path) if path is not None and path.startswith("dblightning.") else None
    return found if found is not None and found.fields else None


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _file(module: str) -> Path:
    """Source file of a module; its parents are not imported.

    Raises:
        NotFound, Unknowable.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise NotFound(f"there is no module {top!r}") from error
    if spec is None:
        raise NotFound(f"there is no module {top!r}")
    if not rest:
        if spec.origin is None or not spec.origin.endswith(".py"):
            raise Unknowable(f"{module} has no Python source")
        return Path(spec.origin)
    if spec.submodule_search_locations is None:
        raise NotFound(f"{top!r} is not a package, so there is no {module!r}")
    folders = [Path(each) for each in spec.submodule_search_locations]
    for index, part in enumerate(rest):
        last = index == len(rest) - 1
        for folder in folders:
            if (folder / part).is_dir():
                if last and (folder / part / "__init__.py").is_file():
                    return folder / part / "__init__.py"
                folders = [folder / part]
                break
            if last and (folder / f"{part}.py").is_file():
                return folder / f"{part}.py"
        else:
            if last and any(list(folder.glob(f"{part}.*")) for folder in folders):
                raise Unknowable(f"{module} has no Python source")
            raise NotFound(f"there is no module {'.'.join([top, *rest[: index + 1]])!r}")
    raise Unknowable(f"{module} is a namespace package")


@cache
def _tree(module: str) -> ast.Module:
    try:
        return ast.parse(_file(module).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise Unknowable(f"{module} cannot be read: {error}") from error


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Top-level statements, those inside ``if`` and ``try`` included."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            pending[:0] = [*node.body, *node.orelse]


def _imported(module: str, tree: ast.Module, name: str) -> tuple[str, str] | None:
    """(module, name) that ``name`` is imported from."""
    package = module if _file(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in _statements(tree):
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                if (each.asname or each.name) == name:
                    parts = package.split(".")
                    base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                    return ".".join(filter(None, (base, node.module))), each.name
    return None


def _signature(module: str, name: str, depth: int) -> Signature:
    if depth == 0:
        raise Unknowable(f"{module}.{name} is re-exported too often")
    tree = _tree(module)
    for node in _statements(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(module, tree, node, depth)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            raise Unknowable(f"{module}.{name} is a function")
    found = _imported(module, tree, name)
    if found is not None:
        return _signature(*found, depth - 1)
    listed = alias(module, "__all__")  # a module that imports its names when they are used lists them
    dynamic = listed is None and any(
        isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in _statements(tree)
    )
    starred = any(
        isinstance(node, ast.ImportFrom) and any(each.name == "*" for each in node.names) for node in _statements(tree)
    )
    assigned = alias(module, name) is not None
    if dynamic or starred or assigned:
        raise Unknowable(f"{module}.{name} is made when it is imported")
    raise NotFound(f"module {module!r} has no {name!r}")


def _of_class(module: str, tree: ast.Module, node: ast.ClassDef, depth: int) -> Signature:
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    own = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    docs = argument_docs(text)
    if own is not None:
        docs = argument_docs(inspect.cleandoc(ast.get_docstring(own) or "")) | docs
    parameters: dict[str, Parameter] = {}
    inherits = True
    fields = own is None and any("dataclass" in ast.unparse(each) for each in node.decorator_list)
    if own is not None:
        parameters = _arguments(own, module, docs)
        inherits = own.args.kwarg is not None
    elif fields:
        parameters = _fields(node, module, docs)
    is_open = False
    if inherits and node.bases:
        try:
            base = _base(module, tree, node, depth)
        except LookupError:
            is_open = ast.unparse(node.bases[0]) not in ("ABC", "object", "NamedTuple")
        else:
            is_open = base.open
            filled = set() if own is None else _given_to_super(own, list(base.parameters))
            for name, each in base.parameters.items():
                if name in filled:
                    continue
                merged = dataclasses.replace(each, doc=docs.get(name, each.doc))
                parameters.setdefault(name, merged)
    elif inherits and own is not None:
        is_open = True
    first = " ".join(text.split("\n\n")[0].split())
    return Signature(f"{module}.{node.name}", first, parameters, is_open, fields)


def _base(module: str, tree: ast.Module, node: ast.ClassDef, depth: int) -> Signature:
    base = ast.unparse(node.bases[0])
    if "." in base:
        owner, _, name = base.rpartition(".")
        for statement in _statements(tree):
            if isinstance(statement, ast.Import):
                for each in statement.names:
                    if (each.asname or each.name) == owner:
                        return _signature(each.name, name, depth - 1)
        raise Unknowable(f"{base} cannot be determined")
    return _signature(module, base, depth - 1)


def _given_to_super(function: ast.FunctionDef, names: list[str]) -> set[str]:
    """Which of the base class's arguments a constructor gives itself in ``super().__init__(…)``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            keywords = {each.arg for each in node.keywords if each.arg is not None}
            return set(names[: len(node.args)]) | keywords
    return set()


def _arguments(function: ast.FunctionDef, module: str, docs: dict[str, str]) -> dict[str, Parameter]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults, strict=True))[1:] + list(
        zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    )
    return {
        each.arg: Parameter(
            each.arg, each.annotation, None if value is None else ast.unparse(value), docs.get(each.arg, ""), module
        )
        for each, value in pairs
    }


def _fields(node: ast.ClassDef, module: str, docs: dict[str, str]) -> dict[str, Parameter]:
    return {
        each.target.id: Parameter(
            each.target.id,
            each.annotation,
            None if each.value is None else ast.unparse(each.value),
            docs.get(each.target.id, ""),
            module,
        )
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }


def argument_docs(text: str) -> dict[str, str]:
    """Texts of a Google-style ``Args`` section, by argument; "a, b: …" counts for both."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section[1].rstrip()):
        names, colon, words = entry.strip().partition(":")
        if colon and re.fullmatch(r"[\w*, ]+", names):
            found |= {name.strip(" *"): " ".join(words.split()) for name in names.split(",")}
    return found
