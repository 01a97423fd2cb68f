"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import dblightning

PACKAGE = Path(dblightning.__file__).parent
#: modules with examples; a test finds one that is missing here
MODULES = ["blending", "settings", "signatures", "weights"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run_as_printed(name: str) -> None:
    module = importlib.import_module(f"dblightning.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_module_with_examples_is_tested() -> None:
    found = [path for path in PACKAGE.rglob("*.py") if "\n    >>> " in path.read_text(encoding="utf-8")]
    assert sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in found) == MODULES
