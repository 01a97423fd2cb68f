"""Arguments of the commands that are not Lightning runs. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

#: forms a LoRA file is written in
LORA_FORMS = ("diffusers", "kohya", "peft")
#: largest difference of a score that converting VILA may make
VILA_TOLERANCE = 2e-3


class CommandParser(argparse.ArgumentParser):
    """argparse's parser with errors of one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


def convert_parser() -> CommandParser:
    """Of ``convert``."""
    parser = CommandParser(prog="python -m dblightning convert", description="Write a LoRA file in another form.")
    parser.add_argument("source", metavar="IN", help="LoRA file or folder: diffusers, kohya (A1111), PEFT or TRL")
    parser.add_argument("target", metavar="OUT", help="file (.safetensors) or folder to write")
    parser.add_argument("--to", choices=LORA_FORMS, required=True, help="kohya: ComfyUI and A1111; diffusers; peft")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def pretrain_parser() -> CommandParser:
    """Of ``pretrain-miniature``."""
    parser = CommandParser(
        prog="python -m dblightning pretrain-miniature", description="Train the embedded miniature from nothing."
    )
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--work", type=Path, help="folder of training states and snapshots (default: OUT.work)")
    parser.add_argument("--vae-steps", type=positive, default=6000)
    parser.add_argument("--unet-steps", type=positive, default=9000)
    parser.add_argument(
        "--clean-steps", type=int, default=2900, help="UNet steps on true captions before the careless ones"
    )
    parser.add_argument("--vae-batch", type=positive, default=32)
    parser.add_argument("--unet-batch", type=positive, default=64)
    parser.add_argument("--images", type=positive, default=80_000, help="training images drawn, once")
    parser.add_argument("--snapshot-minutes", type=float, default=8.0, help="a whole pipeline every so often")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the states in --work")
    return parser


def convert_vila_parser() -> CommandParser:
    """Of ``convert-vila``."""
    parser = CommandParser(
        prog="python -m dblightning convert-vila", description="Convert VILA's SavedModel for VILA(backend='torch')."
    )
    parser.add_argument("saved_model", type=Path, help="folder of google/vila/tensorFlow2/image")
    parser.add_argument("out", type=Path, help="file to write, for example vila.safetensors")
    parser.add_argument("--names", type=Path, help="JSON file {praxis parameter: variable of the SavedModel}")
    parser.add_argument("--tolerance", type=float, default=VILA_TOLERANCE, help="largest difference of a score allowed")
    return parser


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
