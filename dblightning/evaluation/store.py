"""Rows on disk while an evaluation runs: what is written is never lost, and never made twice."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: (blend label, prompt_id, seed): one image
Key = tuple[str, int, int]
SETTINGS = "settings.json"


class RowStore:
    """Append-only JSON lines, one file per process that ever wrote.

    A line is on its way to the disk when :meth:`append` returns, so a killed process loses the batch it was in and
    nothing else; a line cut short is left out. Rows of any number of processes are read, so a run may go on with more
    or fewer of them.

    Args:
        folder: for the files; created by :meth:`open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None

    def open(self, settings: dict[str, Any], rank: int = 0) -> set[Key]:
        """Check that earlier rows are of this evaluation, start this process's file, and return the images done.

        Args:
            settings: what the rows depend on, JSON-able; blends and prompts may be added later and are not in it.
            rank: of this process.

        Raises:
            ValueError: the folder holds rows made with other settings; the first differences are named.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps(settings)))
        number = len(list(self.folder.glob(f"{rank:05d}-*.jsonl")))
        self._file = (self.folder / f"{rank:05d}-{number:03d}.jsonl").open("a", encoding="utf-8")
        return {key_of(row) for row in self.read()}

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{self.folder} holds rows of an evaluation with other settings ({', '.join(different)}): {name} was "
                f"{before.get(name)} and is {settings.get(name)}; set another --model.out, or delete the folder"
            )

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, whole or not at all."""
        lines = "".join(json.dumps(_encoded(row)) + "\n" for row in rows)
        self._file.write(lines)
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """Every row of every process, in no order that means something; one row per image, the latest."""
        rows: dict[Key, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else the process died while it wrote
                    row = _decoded(json.loads(line))
                    rows[key_of(row)] = row
        return list(rows.values())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def key_of(row: dict[str, Any]) -> Key:
    """Which image a row is of."""
    return row["blend"], int(row["prompt_id"]), int(row["seed"])


def keys_of(batch: dict[str, Any], label: str) -> Sequence[Key]:
    """Which images a prompt batch is for, with one blend."""
    pairs = zip(batch["prompt_id"].tolist(), batch["seed"].tolist(), strict=True)
    return [(label, prompt_id, seed) for prompt_id, seed in pairs]


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: {"b64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for key, v in row.items()}


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: base64.b64decode(v["b64"]) if isinstance(v, dict) and "b64" in v else v for key, v in row.items()}
