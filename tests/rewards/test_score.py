"""The score command: a folder of images and a file of prompts in, a table out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dblightning.rewards import JPEGCompressibility, PickScore
from dblightning.rewards.preprocess import from_uint8
from dblightning.rewards.score import list_images, read_prompts, score_main
from tests.rewards.image_reward_cases import picture

NAMES = ["1.png", "2.png", "10.jpg", "a.webp"]
SIZES = [(40, 40), (40, 40), (40, 60), (40, 40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for index, (name, size) in enumerate(zip(NAMES, SIZES, strict=True)):
        Image.fromarray(picture(index, *size)).save(images / name)
    (images / "notes.txt").write_text("not an image")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nten\n\n", encoding="utf-8")
    return tmp_path


def run(folder: Path, *more: str, rewards: str = "jpeg", out: str = "scores.csv") -> pd.DataFrame:
    files = ["--images", str(folder / "images"), "--prompts", str(folder / "prompts.txt"), "--out", str(folder / out)]
    score_main([*files, "--rewards", rewards, "--device", "cpu", *more])
    return (
        pd.read_parquet(folder / out) if out.endswith("parquet") else pd.read_csv(folder / out, keep_default_na=False)
    )


@pytest.mark.parametrize("out", ["scores.csv", "scores.parquet"])
def test_each_image_gets_a_row_with_its_prompt_and_each_rewards_score(
    folder: Path, clip_folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", f"pickscore.weights={clip_folder}", "--set", "jpeg.offset_kb=0", "--batch-size", "2"]
    table = run(folder, *options, rewards="pickscore,jpeg", out=out)
    assert list(table.columns) == ["file", "prompt", "pickscore", "jpeg"]
    assert table["file"].tolist() == NAMES  # numbers by value
    assert table["prompt"].tolist() == ["one", "two", "ten", ""]
    pickscore, jpeg = PickScore(clip_folder), JPEGCompressibility(offset_kb=0)
    for row in table.itertuples():
        image = from_uint8([np.asarray(Image.open(folder / "images" / row.file).convert("RGB"))])
        assert row.pickscore == pytest.approx(pickscore.score(image, [row.prompt]).item(), abs=1e-4)
        assert row.jpeg == pytest.approx(jpeg.score(image, [row.prompt]).item(), abs=1e-6)
    assert "4/4" in capsys.readouterr().err  # the progress bar


def test_prompts_by_file_name_may_come_in_any_order(folder: Path) -> None:
    images = list_images(folder / "images")
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"file": name, "prompt": f"of {name}"}) for name in reversed(NAMES)))
    assert read_prompts(path, images) == [f"of {name}" for name in NAMES]
    path.write_text("\n".join(json.dumps({"prompt": str(i)}) for i in range(4)) + "\n\n")
    assert read_prompts(path, images) == ["0", "1", "2", "3"]
    path.write_text(json.dumps({"file": "1.png", "prompt": "x"}))
    with pytest.raises(ValueError, match=r"no prompt for 3 images, such as 2\.png"):
        read_prompts(path, images)
    path.write_text('{"prompt": "x"}\n{"caption": "y"}')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: expected"):
        read_prompts(path, images)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": "jpg"}, "unknown reward 'jpg'"),
        ({"rewards": "jpeg,jpeg"}, "each reward once"),
        ({"rewards": ","}, "each reward once"),
        ({"out": "scores.txt"}, r"\.parquet or \.csv"),
        ({"out": "nowhere/scores.csv"}, "does not exist"),
        ({"more": ["--batch-size", "0"]}, "batch-size must be >= 1"),
        ({"more": ["--set", "jpeg.quality"]}, "REWARD.ARGUMENT=VALUE"),
        ({"more": ["--set", "vila.scale=1"]}, "a reward of --rewards"),
        ({"more": ["--set", "jpeg.speed=1"]}, "jpeg cannot be built"),
        ({"more": ["--prompts", "absent.txt"]}, r"no file absent\.txt"),
        ({"more": ["--images", "absent"]}, "absent is no folder"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_no_file(folder: Path, change: dict, words: str) -> None:
    with pytest.raises(SystemExit, match=f"score: .*{words}"):
        run(folder, *change.pop("more", []), **change)
    assert not (folder / "scores.csv").exists()


@pytest.mark.filterwarnings("ignore:JPEGCompressibility")
def test_too_few_prompts_a_damaged_image_and_an_existing_table_are_refused(folder: Path) -> None:
    run(folder)
    with pytest.raises(SystemExit, match=r"scores\.csv exists.*--overwrite"):
        run(folder)
    run(folder, "--overwrite")
    (folder / "images" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(SystemExit, match=r"2\.png cannot be read as an image"):
        run(folder, "--overwrite")
    (folder / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(SystemExit, match="2 prompts for 4 images"):
        run(folder, "--overwrite")
