"""``python -m dblightning score``: score a folder of images, for people who never train.

python -m dblightning score --images samples/ --prompts prompts.txt --rewards image_reward,jpeg --out scores.csv
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dblightning.arguments import CommandParser
from dblightning.rewards.registry import REWARDS, build_reward
from dblightning.whole_files import replacing

if TYPE_CHECKING:  # torch and pandas are imported once the command line is known to be right
    import pandas as pd
    import torch
    from torch import Tensor

    from dblightning.rewards.base import RewardMetric

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder (not of folders inside it), sorted by name, numbers by value: 2.png before 10.png.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images: {folder} is not a folder")
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise FileNotFoundError(f"--images: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(files, key=lambda path: _natural(path.name))


def read_prompts(path: Path, images: Sequence[Path]) -> list[str]:
    """One prompt per image.

    Args:
        path: a text file with one prompt per line, in the order of the images; or a ``.jsonl`` file, each line an
            object with "prompt", and with "file" (an image's name) unless the lines are in the order of the images.

    Raises:
        FileNotFoundError: no such file. ValueError: another number of prompts, an image without one or named twice, or
            text that is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: no file {path}")
    try:
        # not splitlines: it splits at characters that are part of a prompt too, such as U+2028
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    if lines[-1] == "":
        lines.pop()  # the file ends with a newline
    if path.suffix.lower() != ".jsonl":
        return _in_order(lines, images, path)
    records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if any(file is None for file, _ in records):
        return _in_order([prompt for _, prompt in records], images, path)
    by_name: dict[str | None, str] = {}
    for file, prompt in records:
        if file in by_name:
            raise ValueError(f"{path} names {file} twice; keep one line per image")
        by_name[file] = prompt
    if missing := [image.name for image in images if image.name not in by_name]:
        raise ValueError(f"{path} names no prompt for {len(missing)} images, such as {missing[0]}")
    return [by_name[image.name] for image in images]


def _record(line: str, place: str) -> tuple[str | None, str]:
    """(file, prompt) of a JSON line."""
    try:
        record = json.loads(line)
        file, prompt = record.get("file"), record["prompt"]
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f'{place}: expected {{"prompt": …, "file": …}}: {error!r}') from error
    if not isinstance(prompt, str) or not isinstance(file, str | None):
        raise ValueError(f"{place}: prompt and file must be strings, got {prompt!r} and {file!r}")
    return file, prompt


def read_image(path: Path) -> np.ndarray:
    """8-bit RGB pixels (H, W, 3), turned upright as EXIF says; transparency is dropped, 16-bit levels are rounded.

    Raises:
        ValueError: not an image, or one whose levels have no known white: 32-bit integers or floats.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
                # Pillow clips 16-bit grey at 255; 65535 / 257 = 255
                grey = np.rint(np.asarray(upright) / 257).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise ValueError("its pixels are 32-bit numbers; convert it to 8 bits per channel")
            return np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: damaged files
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def check_images_of(paths: Sequence[Path]) -> None:
    """Refuse files that are not images, or damaged where that shows without decoding them.

    Raises:
        ValueError: such a file.
    """
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def csv_cell(value: object) -> object:
    """``value`` as a cell of a CSV file that a spreadsheet shows and does not compute.

    Text that it would take for a formula gets an apostrophe before it.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a ``.parquet`` or ``.csv`` file whole or not at all; what was there before stays until then.

    Raises:
        OSError: it could not be written, on a full disk for instance.
    """
    try:
        with replacing(path) as aside:
            if path.suffix == ".parquet":
                table.to_parquet(aside, index=False)
            else:
                table.map(csv_cell).rename(columns=csv_cell).to_csv(aside, index=False)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


def score_files(
    rewards: dict[str, RewardMetric],
    images: Sequence[Path],
    prompts: Sequence[str],
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """One row per image: file, prompt, and a column per reward. Neighbouring images of one size share a batch.

    Args:
        rewards: column name → reward.
        images: files.
        prompts: as many strings.
        batch_size: most images read at once.
        device: where the rewards run.

    Raises:
        ValueError: a file that is not an image, or another number of prompts than images.
    """
    import pandas as pd

    from dblightning.rewards.preprocess import from_uint8

    if len(images) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts for {len(images)} images")
    columns: dict[str, list[float]] = {name: [] for name in rewards}
    for reward in rewards.values():
        reward.to(device)
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        batch: list[np.ndarray] = []
        first = 0
        for index, path in enumerate(images):
            pixels = read_image(path)
            if batch and (len(batch) == batch_size or pixels.shape != batch[0].shape):
                _score_batch(rewards, columns, from_uint8(batch).to(device), prompts[first:index])
                bar.update(len(batch))
                batch, first = [], index
            batch.append(pixels)
        if batch:
            _score_batch(rewards, columns, from_uint8(batch).to(device), prompts[first:])
            bar.update(len(batch))
    return pd.DataFrame({"file": [path.name for path in images], "prompt": list(prompts), **columns})


def score_main(argv: Sequence[str] | None = None) -> None:
    """The command ``score``; exits with status 1 and one sentence on bad input."""
    parser = CommandParser(prog="dblightning score", description="Score a folder of images with rewards.")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of images, taken in the order of their names"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="text file, a prompt per line; or .jsonl")
    parser.add_argument(
        "--rewards", required=True, help=f"comma-separated: {', '.join(REWARDS)}, or dotted paths of classes"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, .parquet or .csv")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="REWARD.ARGUMENT=VALUE",
        help="argument of a reward's constructor, such as image_reward.weights=/models/ImageReward; may be repeated",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", help="of the models; a GPU where there is one, else the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)
    try:
        _score_command(arguments)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        sentence = error.strerror if isinstance(error, OSError) and error.filename is None else None
        raise SystemExit(f"error: {' '.join((sentence or str(error)).split())}") from error


def _score_command(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    # everything that can be wrong is looked at before a model is loaded
    if out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out must end in .parquet or .csv, got {out}")
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out} exists; choose another name or pass --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"--out: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out: no permission to write in the folder {out.parent}")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {arguments.batch_size}")
    names = [name.strip() for name in arguments.rewards.split(",") if name.strip()]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"--rewards must name each reward once, got {arguments.rewards!r}")
    options = read_options(arguments.options, names)
    images = list_images(arguments.images)
    prompts = read_prompts(arguments.prompts, images)
    check_images_of(images)
    rewards = {name: build_reward(name, **options[name]) for name in names}
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    table = score_files(rewards, images, prompts, arguments.batch_size, device)
    write_table(table, out)
    for name in names:
        print(f"{name}: mean {table[name].mean():.4f}, from {table[name].min():.4f} to {table[name].max():.4f}")
    print(f"{out}: {len(table)} images")


def _score_batch(
    rewards: dict[str, RewardMetric], columns: dict[str, list[float]], images: Tensor, prompts: Sequence[str]
) -> None:
    import torch

    with torch.no_grad():
        for name, reward in rewards.items():
            columns[name].extend(reward.score(images, prompts).tolist())


def _in_order(prompts: list[str], images: Sequence[Path], path: Path) -> list[str]:
    if len(prompts) != len(images):
        raise ValueError(
            f"{path} holds {len(prompts)} prompts for {len(images)} images; it needs one line per image, in the order "
            "of their names"
        )
    return prompts


def read_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Constructor arguments by reward from "REWARD.ARGUMENT=VALUE" strings; a value is JSON, or else a plain string.

    Raises:
        ValueError: another form, or a reward that is not among ``names``.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, dot, argument = target.rpartition(".")
        if not equals or not dot or name not in options:
            raise ValueError(f"--set takes REWARD.ARGUMENT=VALUE with a reward of --rewards, got {setting!r}")
        try:
            options[name][argument] = json.loads(value)
        except ValueError:
            options[name][argument] = value  # a path or another plain string
    return options


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
