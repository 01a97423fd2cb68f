"""Files that a reader never sees half written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """A path to write to; at the end its file takes the place of ``path``, whole or not at all.

    What was at ``path`` stays until then, and where writing fails. The file has the permissions of any new one (umask).

    Args:
        path: where the file belongs, in a folder that exists.
        aside: where it is written meanwhile, on the same disk; None: a hidden file beside it, of this thread alone.
    """
    if aside is None:
        aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
