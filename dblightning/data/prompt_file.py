"""Prompts from a file of your own: txt, csv, json or jsonl, with any other columns as metadata."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dblightning.data.base import PromptDataModule
from dblightning.data.stream import PromptSet, check_positive, sample_order


class Row(NamedTuple):
    """One entry of a prompt file."""

    place: str
    #: {column: value}, or the prompt alone
    value: Any
    category: str | None = None


def read_prompts(path: str | Path, prompt_column: str | Sequence[str] = "prompt") -> PromptSet:
    """Read a prompt file, its kind taken from its suffix.

    - ``.txt``: one prompt per line, blank lines left out.
    - ``.csv``: a header line, one of its columns the prompt.
    - ``.jsonl``: one string or object per line, blank lines left out.
    - ``.json``: a list of strings or objects, or {category: such a list}, which adds a "category" column.

    Other columns become metadata; a row without one of them has None there. Duplicate prompts are kept, each with its
    own id.

    Args:
        path: the file, UTF-8 with or without byte order mark.
        prompt_column: the prompt's column, in any case; or several names, the first that is there counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix; a file that is not UTF-8 or not of its kind; no prompt in it; a row without one; a
            column named like a batch's own entries.
    """
    path = Path(path).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"cannot tell how to read {path}: its suffix must be one of {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path.absolute()}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error

    prompts: list[str] = []
    rows: list[dict[str, Any]] = []
    names = [prompt_column] if isinstance(prompt_column, str) else list(prompt_column)
    for row in reader(path, text):
        prompt, other = _split(f"{path}, {row.place}", row.value, names)
        prompts.append(prompt)
        rows.append(other if row.category is None else {**other, "category": row.category})
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        return PromptSet(prompts, {name: [row.get(name) for row in rows] for name in columns})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _split(place: str, row: Any, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(prompt, other columns) of a row."""
    if isinstance(row, dict):
        known = {column.strip().lower(): column for column in row}
        column = next((known[name.lower()] for name in names if name.lower() in known), None)
        if column is None:
            wanted, there = " or ".join(map(repr, names)), ", ".join(map(repr, row)) or "none at all"
            raise ValueError(f"{place}: no column {wanted}, only {there}; rename one or pass its name as prompt_column")
        prompt, other = row[column], {name: value for name, value in row.items() if name != column}
    else:
        prompt, other = row, {}
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place}: a prompt must be a non-empty string, got {prompt!r}")
    return prompt.strip(), other


def _read_txt(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(f"line {number}", line)


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    # the text as a stream with its own line ends, so that a quoted prompt may span lines
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: its header names {twice} more than once; rename one")
    for fields in reader:
        if not fields:
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {reader.line_num}: {len(fields)} fields where the header has {len(header)}; "
                "put a prompt that holds a comma in double quotes"
            )
        yield Row(f"line {reader.line_num}", dict(zip(header, fields, strict=True)))


def _read_jsonl(path: Path, text: str) -> Iterator[Row]:
    # split at line feeds alone: splitlines would also cut at characters that JSON strings may hold
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(f"line {number}", _parse_json(line, f"{path}, line {number}"))


def _read_json(path: Path, text: str) -> Iterator[Row]:
    data = _parse_json(text, str(path)) if text.strip() else []
    if isinstance(data, list):
        yield from (Row(f"entry {index}", value) for index, value in enumerate(data))
        return
    if not isinstance(data, dict) or not all(isinstance(rows, list) for rows in data.values()):
        raise ValueError(f"{path} must hold a list of prompts, or lists of prompts by category")
    for category, rows in data.items():
        yield from (Row(f"{category!r} entry {index}", value, category) for index, value in enumerate(rows))


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


_READERS = {".txt": _read_txt, ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}


class PromptFileDataModule(PromptDataModule):
    """Prompts from your own files.

    Validation prompts come from ``val_file``, or are ``hold_out`` prompts of the training file that are then not
    trained on; without either, validation takes the training prompts. A validation prompt that is a test prompt too is
    left out. A limit keeps the mix of the "category" column, where there is one.

    Args:
        train_file: see ``read_prompts`` for the kinds of file.
        test_file: prompts to test on; without it, a test takes the file's training prompts.
        val_file: prompts to validate on.
        hold_out: how many prompts of ``train_file`` to validate on instead, a random sample by ``limit_seed``.
        prompt_column: the prompt's column in csv, json and jsonl files, in any case.
        settings: see ``PromptDataModule``.

    Raises:
        FileNotFoundError, ValueError: see ``read_prompts``; ``val_file`` together with ``hold_out``; no prompt left to
            train on, or to validate on.
    """

    def __init__(
        self,
        train_file: str | Path,
        test_file: str | Path | None = None,
        prompt_column: str = "prompt",
        val_file: str | Path | None = None,
        hold_out: int | None = None,
        limit_seed: int = 0,
        **settings: Any,
    ) -> None:
        train = read_prompts(train_file, prompt_column)
        test = None if test_file is None else read_prompts(test_file, prompt_column)
        val = None
        if val_file is not None:
            if hold_out is not None:
                raise ValueError(f"give val_file or hold_out, not both, got {val_file} and {hold_out}")
            val = read_prompts(val_file, prompt_column)
        elif hold_out is not None:
            train, val = _hold_out(train, hold_out, limit_seed, train_file)
        if val is not None and test is not None:
            unseen = val.without(test.prompts)
            if not unseen:
                raise ValueError(f"every validation prompt of {val_file or train_file} is a test prompt of {test_file}")
            val = val.select(unseen)
        test = train if test is None else test
        super().__init__(train=train, test=test, val=val, strata=_category, limit_seed=limit_seed, **settings)


def _hold_out(prompts: PromptSet, count: int, seed: int, file: str | Path) -> tuple[PromptSet, PromptSet]:
    """Prompts split into those to train on and ``count`` to validate on; equal prompts go to one side together."""
    check_positive("hold_out", count)
    chosen = {prompts.prompts[index] for index in sample_order(_category(prompts), seed)[:count]}
    kept = prompts.without(chosen)
    if not kept:
        raise ValueError(f"hold_out must leave prompts to train on, got {count} of the {len(prompts)} of {file}")
    return prompts.select(kept), prompts.select([i for i, prompt in enumerate(prompts.prompts) if prompt in chosen])


def _category(prompts: PromptSet) -> list[str]:
    return [str(value) for value in prompts.metadata.get("category", [None] * len(prompts))]
