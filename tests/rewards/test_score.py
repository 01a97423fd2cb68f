"""The score command: a folder of images and a file of prompts in, a table out."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dblightning.rewards import JPEGCompressibility, PickScore
from dblightning.rewards.preprocess import from_uint8
from dblightning.rewards.score import list_images, read_image, read_prompts, score_main
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
        ({"more": ["--device", "toaster"]}, "toaster"),
        ({"more": ["--prompts", "absent.txt"]}, r"no file absent\.txt"),
        ({"more": ["--images", "absent"]}, "absent is not a folder"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_no_file(folder: Path, change: dict, words: str) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
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


def test_a_line_that_names_an_image_twice_is_refused(folder: Path) -> None:
    images = list_images(folder / "images")
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"file": name, "prompt": "x"}) for name in [*NAMES, "2.png"]))
    with pytest.raises(ValueError, match=r"prompts\.jsonl names 2\.png twice"):
        read_prompts(path, images)
    path.write_text('{"file": "1.png", "prompt": 3}')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: prompt and file must be strings, got 3"):
        read_prompts(path, images)


def test_prompts_keep_separators_within_a_line_and_other_encodings_are_refused(folder: Path) -> None:
    images = list_images(folder / "images")
    path = folder / "prompts.txt"
    path.write_bytes("\ufeffone\u2028more\r\ntwo\x0b\r\nten\r\n\r\n".encode())
    assert read_prompts(path, images) == ["one\u2028more", "two\x0b", "ten", ""]
    path.write_bytes("größer\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text .* at byte 2"):
        read_prompts(path, images)


def test_sixteen_bit_images_keep_their_levels(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for suffix in ("png", "tif"):
        Image.fromarray(levels * 257).save(tmp_path / f"grey.{suffix}")
        pixels = read_image(tmp_path / f"grey.{suffix}")
        assert pixels.dtype == np.uint8
        assert all(np.array_equal(pixels[..., channel], levels) for channel in range(3))
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(ValueError, match=r"floats\.tif .* 32-bit numbers; convert it to 8 bits"):
        read_image(tmp_path / "floats.tif")


def test_a_photograph_is_turned_upright_as_its_exif_says(tmp_path: Path) -> None:
    pixels = picture(0, 24, 40)
    for orientation, turned in ((1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1)), (8, np.rot90(pixels))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
        assert np.array_equal(read_image(tmp_path / "photo.png"), turned)


@pytest.mark.parametrize("out", ["scores.csv", "scores.parquet"])
@pytest.mark.filterwarnings("ignore:JPEGCompressibility")
def test_a_full_disk_leaves_the_old_table_and_nothing_half_written(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / out).write_text("what was here before")

    def fill_the_disk(self: pd.DataFrame, path: Path, **options: object) -> None:
        Path(path).write_text("fil")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fill_the_disk)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fill_the_disk)
    with pytest.raises(SystemExit, match=rf"error: .*{out} could not be written: No space left on device"):
        run(folder, "--overwrite", out=out)
    assert (folder / out).read_text() == "what was here before"
    assert sorted(each.name for each in folder.iterdir()) == sorted({"images", "prompts.txt", out})


@pytest.mark.filterwarnings("ignore:JPEGCompressibility")
def test_prompts_are_no_formulas_in_a_csv_file_and_exact_in_a_parquet_file(folder: Path) -> None:
    prompts = ['=HYPERLINK("http://evil.example","a cat")', "+1 cat", "-1 cats", "@cat"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    table = run(folder)
    assert table["prompt"].tolist() == [f"'{prompt}" for prompt in prompts]
    assert table["jpeg"].dtype == float  # negative numbers stay numbers
    assert run(folder, out="scores.parquet")["prompt"].tolist() == prompts


def test_a_damaged_image_is_found_before_a_model_is_loaded(folder: Path) -> None:
    (folder / "images" / "a.webp").write_bytes(b"RIFF")
    with pytest.raises(SystemExit, match=r"a\.webp cannot be read as an image"):
        run(folder, rewards="pickscore")  # whose weights are not there either
