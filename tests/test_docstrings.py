"""Public functions and methods are documented, and the examples in docstrings are true."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import dblightning

PACKAGE = Path(dblightning.__file__).parent
#: modules with examples; a test finds one that is missing here
MODULES = [
    "blending",
    "class_paths",
    "ddim",
    "evaluation.calibration",
    "evaluation.equal_terms",
    "evaluation.scores",
    "few_rows",
    "flow",
    "gaussian_step",
    "methods",
    "objectives.best_of_n",
    "objectives.forward_process",
    "objectives.kl_to_go",
    "objectives.pathwise",
    "objectives.policy_gradient",
    "objectives.stored_mean",
    "per_image",
    "preset",
    "rewards.judge",
    "rewards.text_rendering",
    "settings",
    "signatures",
    "studio.blends",
    "studio.pictures",
    "weights",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run_as_printed(name: str) -> None:
    module = importlib.import_module(f"dblightning.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_module_with_examples_is_tested() -> None:
    found = [path for path in PACKAGE.rglob("*.py") if "\n    >>> " in path.read_text(encoding="utf-8")]
    assert sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in found) == MODULES


def undocumented(path: Path) -> Iterator[str]:
    """Public methods of a module's public classes without a docstring, their own or that of what they override."""
    classes = [each for each in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(each, ast.ClassDef)]
    name = ".".join(("dblightning", *path.relative_to(PACKAGE).with_suffix("").parts))
    for node in classes:
        methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef) and each.name[0] != "_"]
        if node.name[0] != "_" and methods:
            try:
                kind = getattr(importlib.import_module(name), node.name)
            except ImportError as error:
                if "pip install 'dblightning[" in str(error):
                    return  # an extra that is not installed
                raise
            yield from (f"{name}.{node.name}.{each}" for each in methods if not inspect.getdoc(getattr(kind, each)))


def test_public_methods_are_documented_where_they_are_introduced() -> None:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"]
    assert [name for path in paths for name in undocumented(path)] == []
