"""Every kind of prompt file, and a clear word for every broken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dblightning.data import PromptFileDataModule
from dblightning.data.prompt_file import read_prompts

PROMPTS = ["A red cat, asleep.", 'A "blue" dog.', "Été — 猫"]
STYLES = ["oil", "photo", "ink"]
ROWS = [{"prompt": prompt, "style": style} for prompt, style in zip(PROMPTS, STYLES, strict=True)]

FILES = {
    "plain.txt": "\n\n".join(PROMPTS) + "\n",
    "windows.txt": "\ufeff" + "\r\n".join(PROMPTS),
    "table.csv": 'prompt,style\n"A red cat, asleep.",oil\n"A ""blue"" dog.",photo\n\nÉté — 猫,ink\n',
    "upper.csv": 'style,Prompt\noil,"A red cat, asleep."\nphoto,"A ""blue"" dog."\nink,Été — 猫\n',
    "rows.json": json.dumps(ROWS),
    "strings.json": json.dumps(PROMPTS),
    "categories.json": json.dumps({"oil": PROMPTS[:1], "photo": ROWS[1:2], "ink": PROMPTS[2:]}),
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "strings.jsonl": "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in PROMPTS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8", newline="")
    prompts = read_prompts(path)
    assert prompts.prompts == PROMPTS
    if name in ("table.csv", "upper.csv", "rows.json", "rows.jsonl"):
        assert prompts.metadata == {"style": STYLES}
    elif name == "categories.json":
        assert prompts.metadata == {"category": STYLES, "style": [None, "photo", None]}
    else:
        assert prompts.metadata == {}


def test_columns_that_some_rows_lack_are_none_there(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "tag": [1, 2]}\n"b"\n{"prompt": "c", "count": 3}\n')
    assert read_prompts(path).metadata == {"tag": [[1, 2], None, None], "count": [None, None, 3]}


def test_a_quoted_csv_prompt_may_span_lines_and_a_json_one_hold_any_character(tmp_path: Path) -> None:
    table, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    table.write_text('prompt\n"a\nb"\n')
    lines.write_text(json.dumps("a\u2028b", ensure_ascii=False), encoding="utf-8")
    assert read_prompts(table).prompts == ["a\nb"]
    assert read_prompts(lines).prompts == ["a\u2028b"]


def test_another_prompt_column_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("text,style\na cat,ink\n")
    module = PromptFileDataModule(path, prompt_column="text", batch_size=2)
    assert module.train_prompts == ["a cat"]
    assert next(iter(module.train_dataloader()))["style"] == ["ink", "ink"]


def test_evaluation_takes_the_test_file_or_else_the_training_prompts(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("a\nb\nb\n")
    test.write_text("c\n")
    assert PromptFileDataModule(train, test).test_prompts == ["c"]
    # duplicates stay, each with an id of its own
    assert PromptFileDataModule(str(train)).test_prompts == ["a", "b", "b"]


def test_validation_takes_its_file_less_the_test_prompts_or_prompts_held_out_of_training(tmp_path: Path) -> None:
    train, val, test = (tmp_path / f"{name}.txt" for name in ("train", "val", "test"))
    train.write_text("".join(f"prompt {i}\n" for i in range(40)) + "prompt 3\n")
    val.write_text("a\nb\nc\n")
    test.write_text("b\nd\n")
    assert PromptFileDataModule(train, test, val_file=val).val_prompts == ["a", "c"]
    module = PromptFileDataModule(train, test)
    assert module.val_prompts == module.train_prompts  # never the test prompts
    module = PromptFileDataModule(train, test, hold_out=10)
    assert 10 <= len(module.val_prompts) <= 11  # "prompt 3" stands twice, and goes to one side
    assert not set(module.val_prompts) & set(module.train_prompts)
    assert len(module.val_prompts) + len(module.train_prompts) == 41
    assert module.val_prompts == PromptFileDataModule(train, hold_out=10, seed=5).val_prompts
    assert module.val_prompts != PromptFileDataModule(train, hold_out=10, limit_seed=5).val_prompts
    for settings, message in (
        ({"hold_out": 41}, "hold_out must leave prompts to train on, got 41 of the 41"),
        ({"hold_out": 0}, "hold_out must be an integer >= 1, got 0"),
        ({"hold_out": 1, "val_file": val}, "give val_file or hold_out, not both"),
        ({"val_file": test}, "every validation prompt of .*test.txt is a test prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptFileDataModule(train, test, **settings)


def test_a_limit_keeps_a_files_mix_of_categories(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"many": [f"m{i}" for i in range(90)], "few": [f"f{i}" for i in range(10)]}))
    limited = PromptFileDataModule(path, limit_test_prompts=20).test_set
    assert sorted(limited.metadata["category"]) == ["few"] * 2 + ["many"] * 18


def test_a_missing_file_is_named_with_its_full_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no prompt file at {tmp_path}/none.txt"):
        PromptFileDataModule(tmp_path / "none.txt")


EMPTY = {
    "empty.txt": "\n  \n",
    "empty.csv": "",
    "header.csv": "prompt,style\n",
    "empty.json": "[]",
    "nothing.json": "",
    "empty.jsonl": "",
}
BROKEN = {
    **{name: (text, "holds no prompt") for name, text in EMPTY.items()},
    "p.yaml": ("- a", r"suffix must be one of \.txt, \.csv, \.json, \.jsonl"),
    "column.csv": ("text,style\na,b\n", "line 2: no column 'prompt', only 'text', 'style'; rename one"),
    "column.jsonl": ('{"prompt": "a"}\n{}\n', "line 2: no column 'prompt', only none at all"),
    "comma.csv": ("prompt,style\na, b,c\n", "line 2: 3 fields where the header has 2; put a prompt that holds a comma"),
    "twice.csv": ("prompt,prompt\na,b\n", r"names \['prompt'\] more than once"),
    "blank.csv": ("prompt,style\n  ,ink\n", "line 2: a prompt must be a non-empty string, got '  '"),
    "number.json": ("[1]", "entry 0: a prompt must be a non-empty string, got 1"),
    "scalar.json": ("3", "must hold a list of prompts"),
    "broken.json": ("[1,", "broken.json is not JSON"),
    "broken.jsonl": ('"a"\n{"prompt"\n', "broken.jsonl, line 2 is not JSON"),
    "reserved.jsonl": ('{"prompt": "a", "seed": 1}\n', "reserved.jsonl: metadata column 'seed' clashes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_meets_one_clear_sentence(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"a cat\xff\n")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 5\)"):
        read_prompts(path)
