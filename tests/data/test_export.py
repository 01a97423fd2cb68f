"""The committed prompt files are what the code gives, and can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from dblightning.data import export
from dblightning.data.prompt_file import read_prompts

DATA = Path(__file__).parents[2] / "data"
COUNTS = {
    "drawbench_colors.jsonl": 25,
    "drawbench_val.jsonl": 80,
    "drawbench_test.jsonl": 1000,
    "geneval.jsonl": 553,
    "geneval_val.jsonl": 100,
    "geneval_test.jsonl": 700,
    "miniature_train.jsonl": 25,
    "miniature_val.jsonl": 128,
    "miniature_test.jsonl": 300,
}


def test_the_folder_holds_what_the_code_gives() -> None:
    """If this fails after a change of a prompt set: python -m dblightning.data.export."""
    assert {path.name for path in DATA.glob("*.jsonl")} == set(export.files()) == set(COUNTS)
    for name, text in export.files().items():
        assert (DATA / name).read_bytes() == text.encode(), name


def test_export_writes_the_same_files(tmp_path: Path) -> None:
    export.main(str(tmp_path / "new"))
    assert all((tmp_path / "new" / name).read_bytes() == (DATA / name).read_bytes() for name in COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_every_file_can_be_given_to_the_prompt_file_module(name: str) -> None:
    assert len(read_prompts(DATA / name)) == COUNTS[name]
    assert f"`{name}` | {COUNTS[name]} |" in (DATA / "README.md").read_text()
