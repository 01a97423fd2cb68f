"""Arguments of the commands that are not Lightning runs. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

#: forms a LoRA file is written in
LORA_FORMS = ("diffusers", "kohya", "peft")
#: environment variable that holds a service's token
TOKEN_VARIABLE = "DBLIGHTNING_TOKEN"
#: largest difference of a score that converting VILA may make
VILA_TOLERANCE = 2e-3


class CommandParser(argparse.ArgumentParser):
    """argparse's parser with errors of one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


def command_parser(command: str, description: str) -> CommandParser:
    """Of ``python -m dblightning COMMAND``, without options yet."""
    return CommandParser(prog=f"python -m dblightning {command}", description=description)


def convert_parser() -> CommandParser:
    """Of ``convert``."""
    parser = command_parser("convert", "Write a LoRA file in another form.")
    parser.add_argument("source", metavar="IN", help="LoRA file or folder: diffusers, kohya (A1111), PEFT or TRL")
    parser.add_argument("target", metavar="OUT", help="file (.safetensors) or folder to write")
    parser.add_argument("--to", choices=LORA_FORMS, required=True, help="kohya: ComfyUI and A1111; diffusers; peft")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def export_parser() -> CommandParser:
    """Of ``export``."""
    parser = command_parser(
        "export", "Write one LoRA whose images are the exact Rewarded Soup's, for programs that know no blends."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", nargs="+", metavar="NAME=W", help="each >= 0, sum 1")
    what.add_argument("--preset", type=Path, help="preset file, whose weights, base and adapters to take")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=PATH", help="LoRA files or folders")
    parser.add_argument(
        "--base", default="miniature", help="whose adapters to know by name: miniature, or a saved pipeline's folder"
    )
    parser.add_argument("--format", choices=("diffusers", "comfyui", "peft"), default="diffusers")
    parser.add_argument("--out", type=Path, required=True, help="file (.safetensors) or folder to write")
    parser.add_argument("--rank", type=positive, help="cut to this rank by SVD (default: exact, the sum of the ranks)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--name", help="the LoRA's name (default: made of the weights)")
    parser.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def push_parser() -> CommandParser:
    """Of ``push``."""
    parser = command_parser("push", "Make a folder for the hub (adapters, preset, pictures, model card) and upload it.")
    parser.add_argument("repo", metavar="USER/NAME", help="the hub's repository; made if it is not there")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=PATH", help="LoRA files or folders to share")
    parser.add_argument("--soup", type=Path, help="a LoRA that `export` wrote, for the repository's root")
    parser.add_argument("--base", required=True, help="hub id of the base model, or miniature")
    parser.add_argument("--licence", default="apache-2.0", help="the hub's short name of a licence")
    parser.add_argument("--scores", type=Path, help="score table of an evaluation: gains with intervals, pictures")
    parser.add_argument("--preset", type=Path, help="preset file to share (YAML)")
    parser.add_argument("--pictures", nargs="+", type=Path, default=[], help="image files to show")
    parser.add_argument("--title", help="heading of the card (default: the repository's name)")
    parser.add_argument("--out", type=Path, help="folder to make (default: runs/hub/NAME)")
    parser.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    parser.add_argument("--dry-run", action="store_true", help="make the folder, say what would be sent, send nothing")
    return parser


def numbers_by_name(words: Sequence[str]) -> dict[str, float]:
    """``["a=0.3", "b=0.7"]``, also with commas, as {"a": 0.3, "b": 0.7}; exits with a sentence on anything else."""
    found = {}
    for name, text in _pairs([part for each in words for part in each.split(",") if part], "NAME=NUMBER"):
        try:
            found[name] = float(text)
        except ValueError:
            sys.exit(f"error: {name}={text} is not a number; write {name}=0.5")
    return found


def paths_by_name(words: Sequence[str]) -> dict[str, Path]:
    """``["a=runs/a/adapter"]`` as {"a": Path(…)}; exits with a sentence on anything else."""
    return {name: Path(text).expanduser() for name, text in _pairs(words, "NAME=PATH")}


def _pairs(words: Sequence[str], form: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            sys.exit(f"error: expected {form}, got {word!r}")
        if name in dict(found):
            sys.exit(f"error: {name!r} is given twice")
        found.append((name, text))
    return found


def pretrain_parser() -> CommandParser:
    """Of ``pretrain-miniature``."""
    parser = command_parser("pretrain-miniature", "Train the embedded miniature from nothing.")
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


def pretrain_flow_parser() -> CommandParser:
    """Of ``pretrain-flow-miniature``."""
    parser = command_parser(
        "pretrain-flow-miniature", "Train the embedded flow miniature on the other miniature's latents."
    )
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--work", type=Path, help="folder of latents, state and snapshot (default: OUT.work)")
    parser.add_argument("--steps", type=positive, default=16_000)
    parser.add_argument("--clean-steps", type=int, default=12_000, help="steps on true captions before careless ones")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate of AdamW")
    parser.add_argument("--images", type=positive, default=80_000, help="training images drawn, once")
    parser.add_argument("--snapshot-minutes", type=float, default=4.0, help="a whole pipeline every so often")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the state in --work")
    return parser


def convert_vila_parser() -> CommandParser:
    """Of ``convert-vila``."""
    parser = command_parser("convert-vila", "Convert VILA's SavedModel for VILA(backend='torch').")
    parser.add_argument("saved_model", type=Path, help="folder of google/vila/tensorFlow2/image")
    parser.add_argument("out", type=Path, help="file to write, for example vila.safetensors")
    parser.add_argument("--names", type=Path, help="JSON file {praxis parameter: variable of the SavedModel}")
    parser.add_argument("--tolerance", type=float, default=VILA_TOLERANCE, help="largest difference of a score allowed")
    return parser


def quickstart_parser() -> CommandParser:
    """Of ``quickstart``."""
    parser = command_parser(
        "quickstart", "Train an adapter on the embedded miniature, blend and score it; pictures in runs/quickstart."
    )
    parser.add_argument("--check", action="store_true", help="one small rollout only: whether the installation works")
    return parser


def serve_parser() -> CommandParser:
    """Of ``serve``."""
    parser = command_parser("serve", "Images over HTTP, on OpenAI's images endpoint.")
    _model_options(parser)
    parser.add_argument("--host", choices=("127.0.0.1", "0.0.0.0", "::"), default="127.0.0.1")
    parser.add_argument("--port", type=positive, default=8000, help="from 1024 to 65535 [8000]")
    parser.add_argument("--token-file", type=Path, help="file with the token that clients must send")
    parser.add_argument("--token-env", default=TOKEN_VARIABLE, help=f"or the environment variable [{TOKEN_VARIABLE}]")
    parser.add_argument("--no-token", action="store_true", help="let everyone who reaches the address use the service")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--devices", default="auto", help="number of devices, or auto: all there are [auto]")
    parser.add_argument("--workers-per-device", type=positive, default=1)
    parser.add_argument("--threads", type=positive, help="torch threads of each worker")
    parser.add_argument("--max-batch-size", type=positive, default=8, help="images made together [8]")
    parser.add_argument("--batch-wait", type=float, default=0.02, help="seconds a batch waits for more [0.02]")
    parser.add_argument("--max-rows", type=positive, help="rows of a denoiser call; all of a batch unless given")
    parser.add_argument("--queue-limit", type=positive, default=64, help="images waiting or in the works [64]")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a request may take [60]")
    parser.add_argument("--max-images", type=positive, default=10, help="largest n of a request [10]")
    parser.add_argument("--max-size", type=positive, default=1024, help="longest side in pixels [1024]")
    parser.add_argument("--max-steps", type=positive, default=100, help="most denoising steps [100]")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    return parser


def studio_parser() -> CommandParser:
    """Of ``studio``."""
    parser = command_parser("studio", "A page to try blends by hand.")
    _model_options(parser)
    parser.add_argument(
        "--reward", dest="rewards", action="append", default=[], metavar="NAME=REWARD",
        help="a reward for the live scores, by short name or dotted path; may be repeated [the miniature's]",
    )  # fmt: skip
    parser.add_argument(
        "--scores", action="append", default=[], type=Path, metavar="FILE",
        help="score table that the Compare tab offers; may be repeated",
    )  # fmt: skip
    parser.add_argument("--device", help="of the pipeline and the rewards [a GPU where there is one, else the CPU]")
    parser.add_argument("--max-rows", type=positive, help="rows of a denoiser call; all unless given")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only]")
    parser.add_argument("--port", type=positive, default=7860)
    parser.add_argument(
        "--token-env", default=TOKEN_VARIABLE, help=f"environment variable with the page's password [{TOKEN_VARIABLE}]"
    )
    parser.add_argument("--no-token", action="store_true", help="let everyone who reaches the address use the page")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    """Of a command that loads a pipeline."""
    parser.add_argument("--base", help="pipeline folder, hub id, or miniature [the preset's, else miniature]")
    parser.add_argument(
        "--adapter", dest="adapters", action="append", default=[], metavar="NAME=PATH",
        help="a LoRA and its name; may be repeated [those that come with the base]",
    )  # fmt: skip
    parser.add_argument(
        "--preset", dest="presets", action="append", default=[], type=Path, metavar="FILE",
        help="preset YAML; may be repeated, the first is the default",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the base")


def named_paths(settings: Sequence[str], option: str) -> dict[str, str] | None:
    """name → path of "NAME=PATH" settings; None for none.

    Raises:
        ValueError: another form, or a name given twice.
    """
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, path = setting.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"{option} takes NAME=PATH, got {setting!r}")
        if name in found:
            raise ValueError(f"{option} names {name!r} twice")
        found[name] = path
    return found or None


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
