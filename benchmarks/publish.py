"""What benchmarks share: the options of their output, the top of their tables, and writing both record and table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, tiny: str | None = None
) -> argparse.Namespace:
    """A benchmark's command line, with ``--json`` added, and ``--tiny`` where there is a help text for it."""
    if tiny is not None:
        parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--json", type=Path, help="file to write; the Markdown tables go beside it")
    return parser.parse_args(arguments)


def header(*columns: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def opening(conditions: str, record: dict[str, Any], *columns: str) -> list[str]:
    """What was measured and on which machine, in one paragraph, and the first two lines of the table below it."""
    return [f"{conditions} {machine.sentence(record['machine'])}.", "", *header(*columns)]


def publish(record: dict[str, Any], table: str, file: Path | None) -> None:
    """Print the Markdown table; with a JSON file, write the record there and the table beside it (``.md``)."""
    print(table)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
