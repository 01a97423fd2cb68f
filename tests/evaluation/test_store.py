from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dblightning.evaluation.store import RowStore, key_of

SETTINGS = {"guidance_scale": 3.0, "rewards": {"a": "A"}}


def row(blend: str, prompt_id: int, seed: int = 0, value: float = 0.1) -> dict[str, Any]:
    return {"blend": blend, "prompt_id": prompt_id, "seed": seed, "reward/a": value, "thumbnail": bytes(range(192))}


def filled(folder: Path, count: int = 3) -> RowStore:
    store = RowStore(folder)
    store.open(SETTINGS)
    for each in range(count):
        store.append([row("base", each)])
    return store


def test_rows_come_back_as_they_were_to_the_last_bit(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.open(SETTINGS)
    rows = [row("base", 0, value=0.1 + 0.2), row("base", 1, value=float("nan")), row("base", 2, value=-1e-300)]
    store.append(rows)
    found = {each["prompt_id"]: each for each in RowStore(tmp_path).read()}
    assert found[0] == rows[0] and found[2] == rows[2]
    assert math.isnan(found[1]["reward/a"])


def test_a_line_cut_short_is_left_out_and_the_rest_kept(tmp_path: Path) -> None:
    filled(tmp_path).close()
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    again = RowStore(tmp_path)
    assert again.open(SETTINGS) == {("base", 0, 0), ("base", 1, 0)}
    again.append([row("base", 2)])  # into a file of its own, not behind the torn line
    assert {key_of(each) for each in again.read()} == {("base", each, 0) for each in range(3)}


def test_rows_of_all_processes_are_read_and_an_image_counts_once(tmp_path: Path) -> None:
    filled(tmp_path).close()
    other = RowStore(tmp_path)
    other.open(SETTINGS, rank=1)
    other.append([row("base", 2), row("base", 3)])
    assert len(other.read()) == 4


def test_rows_of_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with pytest.raises(ValueError, match=r"guidance_scale was 3.0 and is 5.0; set another --model.out"):
        RowStore(tmp_path).open(SETTINGS | {"guidance_scale": 5.0})
