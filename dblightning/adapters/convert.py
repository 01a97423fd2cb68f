"""``python -m dblightning convert IN OUT --to kohya|diffusers|peft``: a LoRA file in another form."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dblightning.adapters.files import (
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Form,
    file_in,
    find_file,
    read_lora,
    write_lora,
)
from dblightning.arguments import convert_parser


def convert(source: str | Path, target: str | Path, to: Form, overwrite: bool = False) -> Path:
    """Rewrite a LoRA's keys; tensors, scales and our metadata stay as they are.

    Args:
        source: file or folder, in any form that docs/adapters.md lists.
        target: a ``.safetensors`` file, or a folder for a file of the form's usual name.
        to: "diffusers", "kohya" or "peft". The peft form holds the denoiser's part alone, with a warning.
        overwrite: replace an existing file.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: nothing at ``source``.
        FileExistsError: the file to write exists.
        ValueError: no LoRA, or one that the form has no place for.
    """
    lora = read_lora(source)
    if lora.assumed:
        warnings.warn(lora.assumed, stacklevel=2)
    if to == "peft" and lora.modules.keys() != {lora.denoiser}:
        if lora.denoiser not in lora.modules:
            raise ValueError(f"{source} holds no denoiser LoRA, which is all that the peft form can hold")
        lost = sorted(lora.modules.keys() - {lora.denoiser})
        warnings.warn(f"the peft form holds the denoiser's part alone; left out: {', '.join(lost)}", stacklevel=2)
    origin = find_file(source)
    stem = origin.parent.resolve().name if origin.name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME) else origin.stem
    path = file_in(target, to, lora.facts.get("adapter") or stem)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; name another file, or pass --overwrite")
    return write_lora(path, lora, to)


def convert_main(argv: Sequence[str]) -> None:
    """The command."""
    arguments = convert_parser().parse_args(argv)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            path = convert(arguments.source, arguments.target, arguments.to, arguments.overwrite)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"LoRA written to {path}")
