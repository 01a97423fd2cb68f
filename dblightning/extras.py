"""Optional libraries: what needs one says so before it begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


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
        raise ImportError(f"{what} needs {module}, which is not installed: {_command(extra)}")


@contextmanager
def importing(what: str, extra: str, or_else: str = "") -> Iterator[None]:
    """Around the imports of optional libraries: an error of theirs becomes one sentence.

    Args:
        what: subject of the sentence.
        extra: of this package, that brings the libraries.
        or_else: end of the sentence, after the command.

    Raises:
        ImportError: with the command that installs what is missing; where the library is there and its import fails,
            as one that is broken or of another version does, with the cause.
    """
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        missing = module and not has(module)
        reason = f"needs {module}, which is not installed" if missing else f"cannot import what it needs ({error})"
        raise ImportError(f"{what} {reason}: {_command(extra)}{or_else}") from error


def has(module: str) -> bool:
    """Whether a library is installed."""
    return importlib.util.find_spec(module) is not None


def _command(extra: str) -> str:
    return f"pip install 'dblightning[{extra}]'"
