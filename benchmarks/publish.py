"""Output of a benchmark's record: the screen, and files if requested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def publish(record: dict[str, Any], table: str, file: Path | None) -> None:
    """Print the Markdown table; with a JSON file, write the record there and the table beside it (``.md``)."""
    print(table)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
