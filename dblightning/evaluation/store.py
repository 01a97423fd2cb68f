"""Rows on disk while an evaluation runs: none lost, none made twice, none taken for those of another image."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dblightning.evaluation.record import differences
from dblightning.evaluation.scores import FORMER_NAMES
from dblightning.evaluation.specs import BlendSpec, blend_key
from dblightning.whole_files import replacing

SETTINGS, ADAPTERS = "settings.json", "adapters.json"
REMEDY = "set another --model.out, or delete the folder"


class Key(NamedTuple):
    """Key of an image: its own parts; the settings and the adapters' weights are the whole folder's."""

    blend: str  # its :func:`dblightning.evaluation.specs.blend_key`, not its label
    prompt_id: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Settings that rows depend on.

    Args:
        settings: what every image and score depends on, JSON-able.
        adapters: name → SHA-256 of the weights of every adapter some blend runs.
        blends: what runs.
        prompts: prompt_id → text of the prompts it visits, as far as they are known beforehand.
        columns: what every row must have beside its scores; images whose rows lack one are made again.
    """

    settings: Mapping[str, Any]
    adapters: Mapping[str, str] = field(default_factory=dict)
    blends: Sequence[BlendSpec] = ()
    prompts: Mapping[int, str] = field(default_factory=dict)
    columns: Sequence[str] = ()


class RowStore:
    """Append-only JSON lines, one file per process that ever wrote.

    A line is on its way to the disk when :meth:`append` returns, so a killed process loses the batch it was in and
    nothing else; a line cut short is left out. Rows of any number of processes are read, so a run may resume with more
    or fewer of them.

    Args:
        folder: for the files; created by :meth:`open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None

    def check(self, evaluation: Evaluation) -> set[Key]:
        """Compare what the folder holds with an evaluation, write nothing, and return the images that are done.

        Blends, prompts and seeds may be added to those of earlier rows, and be left out.

        Raises:
            ValueError: the folder holds rows made with other settings, other weights under an adapter's name, another
                prompt under a prompt_id, or another blend under a label: the first difference is named. Or one of its
                files is broken: the file and what to do are named.
        """
        rows = self.read()
        settings, adapters = self._load(SETTINGS), self._load(ADAPTERS)
        if rows and settings is None:
            raise ValueError(
                f"{self.folder} holds rows but no {SETTINGS}, so what made them cannot be determined; {REMEDY}"
            )
        self._check_settings(settings or {}, _as_json(evaluation.settings))
        self._check_adapters(rows, adapters, evaluation)
        self._check_blends(rows, evaluation.blends)
        self._check_prompts(rows, evaluation.prompts)
        return {key_of(row) for row in rows if all(name in row for name in evaluation.columns)}

    def open(self, evaluation: Evaluation, rank: int = 0) -> set[Key]:
        """:meth:`check`, then start this process's file; rank 0 also writes down what the rows depend on."""
        done = self.check(evaluation)
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            # what an earlier version did not write down yet is added
            self._save(SETTINGS, _as_json(evaluation.settings) | (self._load(SETTINGS) or {}))
            self._save(ADAPTERS, (self._load(ADAPTERS) or {}) | dict(evaluation.adapters))
        number = len(list(self.folder.glob(f"{rank:05d}-*.jsonl")))
        self._file = (self.folder / f"{rank:05d}-{number:03d}.jsonl").open("a", encoding="utf-8")
        return done

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, whole or not at all."""
        lines = "".join(json.dumps(_encoded(row)) + "\n" for row in rows)
        self._file.write(lines)
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """Every row of every process, in no order that means something; one row per image, the latest.

        A column that one row of an image has and another lacks is in its row.

        Raises:
            ValueError: a line that is not a row; the file and the line are named.
        """
        rows: dict[Key, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            *lines, _ = file.read_bytes().split(
                b"\n"
            )  # behind the last newline: nothing, or what a dying process wrote
            for number, line in enumerate(lines, start=1):
                try:
                    row = _decoded(json.loads(line))
                    rows[key_of(row)] = rows.get(key_of(row), {}) | row
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{file}, line {number} is not a row of scores ({error!r}); delete that line, and its image is "
                        "made again"
                    ) from error
        return list(rows.values())

    def close(self) -> None:
        """Close the file that rows are written to, where one is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is not readable JSON ({error}), so what the rows beside it were made with cannot be "
                f"determined; restore the file, or {REMEDY}"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold a JSON object, got {found!r}; restore the file, or {REMEDY}")
        return found

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.folder / name) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    # ── what may differ from earlier rows, and what may not ──────────────────────────────────────────────────────────

    def _check_settings(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        found = list(differences(before, now))
        if found:
            names = ", ".join(dict.fromkeys(path.split(".")[0] for path, _, _ in found))
            path, was, new = found[0]
            raise ValueError(
                f"{self.folder} holds rows of an evaluation with other settings ({names}): {path} was {was} and is "
                f"{new}; {REMEDY}"
            )

    def _check_adapters(self, rows: Sequence[Any], before: dict[str, Any] | None, evaluation: Evaluation) -> None:
        if rows and before is None and evaluation.adapters:
            raise ValueError(
                f"{self.folder} holds rows but no {ADAPTERS}, so the weights they were made with cannot be determined; "
                f"{REMEDY}"
            )
        for name, digest in evaluation.adapters.items():
            was = (before or {}).get(name, digest)
            if was != digest:
                raise ValueError(
                    f"{self.folder} holds rows of another adapter {name!r}: the SHA-256 of its weights was "
                    f"{str(was)[:12]}… and is {digest[:12]}…; {REMEDY}"
                )

    def _check_blends(self, rows: Sequence[dict[str, Any]], blends: Sequence[BlendSpec]) -> None:
        stored = {(row["blend"], blend_key(row)): row for row in rows}
        for spec in blends:
            for (label, key), row in stored.items():
                if label == spec.label and key != spec.key:
                    what, was, now = _blend_difference(row, spec.columns())
                    raise ValueError(
                        f"{self.folder} holds rows of another blend {label!r}: its {what} was {was} and is {now}; "
                        f"{REMEDY}"
                    )

    def _check_prompts(self, rows: Sequence[dict[str, Any]], prompts: Mapping[int, str]) -> None:
        other = {}
        for row in rows:
            now = prompts.get(int(row["prompt_id"]))
            if now is not None and row.get("prompt", now) != now:
                other[int(row["prompt_id"])] = (row["prompt"], now)
        if other:
            first, (was, now) = min(other.items())
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            raise ValueError(
                f"{self.folder} holds rows of other prompts: prompt {first} was {was!r} and is {now!r}{more}; {REMEDY}"
            )


def key_of(row: dict[str, Any]) -> Key:
    """Which image a row is of; of rows that an earlier version wrote as well."""
    return Key(blend_key(row), int(row["prompt_id"]), str(row.get("prompt", "")), int(row["seed"]))


def keys_of(batch: dict[str, Any], spec: BlendSpec) -> list[Key]:
    """Which images a prompt batch is for, with one blend."""
    parts = zip(batch["prompt_id"].tolist(), batch["prompt"], batch["seed"].tolist(), strict=True)
    return [Key(spec.key, prompt_id, prompt, seed) for prompt_id, prompt, seed in parts]


def _blend_difference(row: Mapping[str, Any], columns: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first part in which two blends of one label differ: (what, in the row, now)."""

    def weights(of: Mapping[str, Any]) -> dict[str, float]:
        return {name.removeprefix("weight/"): of[name] for name in of if name.startswith("weight/") and of[name]}

    for name in ("method", "adapter", "kl_scale", "ls_schedule", "options"):
        if row.get(name) != columns.get(name):
            return name, repr(row.get(name)), repr(columns.get(name))
    return "weights", weights(row), weights(columns)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: {"b64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for key, v in row.items()}


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a line, under the names of this version."""
    named = {FORMER_NAMES.get(key, key): value for key, value in row.items()}
    return {key: base64.b64decode(v["b64"]) if isinstance(v, dict) and "b64" in v else v for key, v in named.items()}
