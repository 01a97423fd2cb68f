"""Classes by dotted path, as configs and options name those from outside the package."""

from __future__ import annotations

import importlib
from typing import Any


def is_path(name: object) -> bool:
    """Whether a name is a dotted path: a module and something in it.

    >>> is_path("my_package.MyBlend"), is_path("db-mpa"), is_path("my package.MyBlend")
    (True, False, False)
    """
    parts = str(name).split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def import_class(path: str, subject: str, *kinds: type) -> Any:
    """The class at a dotted path. Its module is imported: take paths from people you trust.

    Args:
        path: module and class.
        subject: what messages call it, such as "method".
        kinds: what the class must derive from.

    Raises:
        ValueError: there is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{subject} {path!r} cannot be imported: {error}; name its module and class") from error
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise ValueError(f"{subject} {path!r} must be a {names(*kinds)} class, got {found!r}")
    return found


def names(*kinds: type) -> str:
    """Classes by name, for messages."""
    return " or ".join(kind.__name__ for kind in kinds)
