"""``python -m dblightning export``: one LoRA of an exact soup, for programs that know nothing of blends."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from dblightning.adapters.files import Form, file_digest, file_in, read_lora, write_lora
from dblightning.adapters.soup import Soup, as_dtype, soup_lora
from dblightning.arguments import export_parser, numbers_by_name, paths_by_name
from dblightning.miniature import adapter_paths
from dblightning.preset import Preset, adapters_of

#: the command's formats → forms of a LoRA file
FORMATS: dict[str, Form] = {"diffusers": "diffusers", "comfyui": "kohya", "peft": "peft"}
DTYPES = ("float32", "float16", "bfloat16")


def export_soup(
    adapters: Mapping[str, str | Path],
    weights: Mapping[str, float],
    target: str | Path,
    format: str = "diffusers",
    rank: int | None = None,
    dtype: str = "float32",
    name: str | None = None,
    normalize: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Soup]:
    """Write the exact Rewarded Soup of some adapters as one LoRA.

    Its images are those of ``method="rewarded-soup"``. DB-MPA mixes predictions instead, which no LoRA does: to first
    order in ΔW the two agree (docs/methods.md).

    Args:
        adapters: name → file or folder of a LoRA.
        weights: name → weight, each ≥ 0, sum 1.
        target: a ``.safetensors`` file, or a folder for a file of the format's usual name.
        format: "diffusers", "comfyui" (kohya's keys, also A1111's and Forge's) or "peft" (``target`` is a folder).
        rank: cut to this rank by SVD; None keeps the exact soup, whose rank is the sum of the adapters'.
        dtype: "float32", "float16" or "bfloat16" of what is written.
        name: the LoRA's name; None is made of the weights.
        normalize: divide the weights by their sum.
        overwrite: replace an existing file.

    Returns:
        The file, and the soup as it was before rounding to ``dtype``.

    Raises:
        FileNotFoundError: an adapter is not there.
        FileExistsError: the file is there already.
        ValueError: an unknown format or dtype, weights that do not fit, or adapters that have no soup as one LoRA.
    """
    import torch

    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {format!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    used = {each: weight for each, weight in weights.items() if weight or each not in adapters}
    name = name or "soup_" + "_".join(f"{each}-{weight:g}" for each, weight in sorted(used.items()))
    path = file_in(target, FORMATS[format], name)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; name another file, or pass --overwrite")
    parts = {}
    for each, where in adapters.items():
        if each in used:
            parts[each] = read_lora(where)
            parts[each].facts["sha256"] = file_digest(where)
            if parts[each].assumed:
                warnings.warn(f"adapter {each!r}: {parts[each].assumed}", stacklevel=2)
    made = soup_lora(parts or dict.fromkeys(adapters), used, rank, normalize)  # type: ignore[arg-type]
    made.lora.facts["adapter"] = name
    lora = made.lora if dtype == "float32" else as_dtype(made.lora, getattr(torch, dtype))
    return write_lora(path, lora, FORMATS[format]), made


def preset_parts(path: str | Path) -> tuple[dict[str, float], dict[str, Path]]:
    """Weights and adapters of a preset file, with a warning where its images are not a soup's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a preset, or weights that change along the trajectory, none at all, or a λ other than 1: what
            one LoRA has no place for.
    """
    preset = Preset.read(path)
    if not isinstance(preset.weights, Mapping):
        what = "no weights" if preset.weights is None else "weights that change along the trajectory"
        raise ValueError(f"{path} has {what}, which one LoRA cannot hold; give --weights")
    if preset.kl_scale != 1:
        raise ValueError(f"{path} has kl_scale {preset.kl_scale:g}, which a soup has no place for; give --weights")
    if preset.method != "rewarded-soup":
        warnings.warn(f"{path} is of {preset.method}, whose images differ from those of this soup", stacklevel=2)
    known = adapters_of(preset.base) if preset.adapters is None else preset.adapters
    return dict(preset.weights), {name: Path(where) for name, where in known.items()}


def described(made: Soup) -> str:
    """What a soup's rank keeps of it, in a sentence."""
    if not made.error:
        return f"exact, rank {made.rank}"
    module, error = made.worst
    return (
        f"cut to rank {made.rank}: ‖ΔW − ΔW'‖ / ‖ΔW‖ is {made.error:.3g} over all modules, at most {error:.3g} in one "
        f"({module})"
    )


def export_main(argv: Sequence[str]) -> None:
    """The command."""
    options = export_parser().parse_args(argv)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if options.preset is not None:
                weights, adapters = preset_parts(options.preset)
            else:
                weights, adapters = numbers_by_name(options.weights), adapters_of(options.base)
            adapters |= adapter_paths(paths_by_name(options.adapters))
            if not adapters:
                raise ValueError(f"{options.base} brings no adapters; name them: --adapters NAME=FOLDER NAME=FOLDER")
            path, made = export_soup(
                adapters, weights, options.out, options.format, options.rank, options.dtype, options.name,
                options.normalize, options.overwrite,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{path}: {described(made)}")
