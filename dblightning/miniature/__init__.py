"""The embedded miniature: a tiny Stable Diffusion of coloured shapes, shipped with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def path() -> Path:
    """The shipped pipeline's folder, for ``StableDiffusionPipeline.from_pretrained``.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    folder = _FOLDER / "weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the miniature's weights are missing from {folder}: reinstall dblightning with its package data, "
            f"or make them with `python -m dblightning pretrain-miniature --out {folder}`"
        )
    return folder


def adapters() -> dict[str, Path]:
    """Folders of the shipped LoRAs by name, sorted; empty where none is shipped.

    Raises:
        FileNotFoundError: the package was installed without its data, or a folder holds no LoRA.
    """
    path()
    folders = sorted(folder for folder in (_FOLDER / "adapters").glob("*") if folder.is_dir())
    for folder in folders:
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"the shipped adapter {folder} holds no .safetensors file: reinstall dblightning")
    return {folder.name: folder for folder in folders}
