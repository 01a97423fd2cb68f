"""Loading a diffusers pipeline from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dblightning.backbone.family import FAMILIES, Family, family_of
from dblightning.miniature import EMBEDDED

#: where a hub model is looked for
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


def load_pipeline(
    pretrained: str,
    dtype: Any = torch.float32,
    variant: str | None = None,
    family: type[Family] | None = None,
    **options: Any,
) -> Any:
    """A diffusers text-to-image pipeline, safety checker off unless ``options`` bring one.

    Args:
        pretrained: local folder, hub id, "miniature" or "miniature-flow".
        dtype: precision of all weights, or component → precision (with "default").
        variant: weight variant of the files.
        family: the model's; None is that of the pipeline's class.
        options: further keywords of diffusers' ``from_pretrained``: components, ``revision``, ``use_safetensors``, …

    Raises:
        FileNotFoundError: nothing loadable there; one sentence says what to download or where to point.
        ValueError: a pipeline of no known family.
    """
    from diffusers import DiffusionPipeline

    if pretrained in EMBEDDED:
        pretrained = str(EMBEDDED[pretrained].path())
    advice = (
        f"no diffusers pipeline at {pretrained!r}: set --model.backbone.init_args.pretrained to a local pipeline "
        "folder or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5 (download it once with `hf download "
        '<id>`), or to "miniature" or "miniature-flow"'
    )
    looks_local = pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1
    if looks_local and not (Path(pretrained).expanduser() / "model_index.json").is_file():
        raise FileNotFoundError(advice)
    source = str(Path(pretrained).expanduser()) if Path(pretrained).expanduser().is_dir() else pretrained
    try:
        where = {name: options[name] for name in HUB_OPTIONS if name in options}
        family = family or _family_named(DiffusionPipeline.load_config(source, **where)["_class_name"])
        return family.load(source, dtype=dtype, variant=variant, **{**family.load_options, **options})
    except OSError as error:  # huggingface_hub's errors for a missing model or network are OSErrors
        raise FileNotFoundError(f"{advice} ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def _family_named(kind: Any) -> type[Family]:
    """The family of a pipeline class's name in ``model_index.json``."""
    import diffusers

    if isinstance(kind, str) and kind not in FAMILIES and isinstance(getattr(diffusers, kind, None), type):
        return family_of(getattr(diffusers, kind))
    # a class that comes with the files: diffusers finds it, and its base classes tell the family
    plain: Any = Family
    return FAMILIES.get(kind, plain) if isinstance(kind, str) else plain
