"""Optional libraries: what needs one says so before it begins."""

from __future__ import annotations

import importlib.util


def check_extra(what: str, module: str, extra: str) -> None:
    """Refuse what needs an optional library that is not installed; nothing is imported.

    Args:
        what: subject of the sentence.
        module: the library's name in Python.
        extra: of this package, that brings it.

    Raises:
        ImportError: one sentence with the command that installs it.
    """
    if not has(module):
        raise ImportError(f"{what} needs {module}, which is not installed: pip install 'dblightning[{extra}]'")


def has(module: str) -> bool:
    """Whether a library is installed."""
    return importlib.util.find_spec(module) is not None
