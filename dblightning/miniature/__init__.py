"""The embedded miniatures: tiny pipelines of coloured shapes, shipped with the package.

"miniature" is a Stable Diffusion, "miniature-flow" a Stable Diffusion 3 on the same latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent


class Embedded(NamedTuple):
    """An embedded pipeline by its folders here."""

    weights: str
    loras: str
    command: str
    #: tokens of T5's embedding that it was trained with; None where there is no T5
    text_tokens: int | None = None

    def path(self) -> Path:
        """The pipeline's folder.

        Raises:
            FileNotFoundError: the package was installed without its data.
        """
        folder = _FOLDER / self.weights
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"the miniature's weights are missing from {folder}: reinstall dblightning with its package data, "
                f"or make them with `python -m dblightning {self.command} --out {folder}`"
            )
        return folder

    def adapters(self) -> dict[str, Path]:
        """Folders of its shipped LoRAs by name, sorted; empty where none is shipped.

        Raises:
            FileNotFoundError: the package was installed without its data, or a folder holds no LoRA.
        """
        self.path()
        folders = sorted(folder for folder in (_FOLDER / self.loras).glob("*") if folder.is_dir())
        for folder in folders:
            if not any(folder.glob("*.safetensors")):
                raise FileNotFoundError(
                    f"the shipped adapter {folder} holds no .safetensors file: reinstall dblightning"
                )
        return {folder.name: folder for folder in folders}


#: name, as in ``pretrained: miniature`` → the embedded pipeline
EMBEDDED: Mapping[str, Embedded] = {
    "miniature": Embedded("weights", "adapters", "pretrain-miniature"),
    "miniature-flow": Embedded("flow_weights", "flow_adapters", "pretrain-flow-miniature", text_tokens=10),
}


def path() -> Path:
    """The UNet miniature's folder, for ``StableDiffusionPipeline.from_pretrained``.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    return EMBEDDED["miniature"].path()


def adapters(version: str | None = None) -> dict[str, Path]:
    """Folders of the UNet miniature's shipped LoRAs by name, sorted; empty where none is shipped.

    Args:
        version: "0.1", those of that release (rank 4, policy gradient), which some tables of docs/results are of;
            "one-alpha", an aesthetic one of the same α as today's alignment, which Lemma 1 asks for, and that alignment
            trained for three times the images by the reward's gradient; None, today's.

    Raises:
        ValueError: a version that is not shipped.
        FileNotFoundError: the package was installed without its data, or a folder holds no LoRA.
    """
    own = EMBEDDED["miniature"]
    if version is None:
        return own.adapters()
    if version not in ("0.1", "one-alpha"):
        raise ValueError(f"the miniature's adapters are shipped as 0.1, one-alpha and today's, got version {version!r}")
    return own._replace(loras=f"adapters-{version}").adapters()


def adapter_folder(named: str | Path) -> Path:
    """A folder as settings name it: "miniature:alignment" is a shipped LoRA, "miniature:0.1/alignment" an older one.

    Raises:
        ValueError: no such LoRA is shipped.
    """
    start, _, rest = str(named).partition(":")
    if start != "miniature" or not rest:
        return Path(named)
    version, _, name = rest.rpartition("/")
    found = adapters(version or None)
    if name not in found:
        raise ValueError(f"the miniature ships no adapter {name!r} as of {version or 'today'}; it has {sorted(found)}")
    return found[name]


def adapter_paths(named: Mapping[str, str | Path]) -> dict[str, Path]:
    """:func:`adapter_folder` of each."""
    return {name: adapter_folder(folder) for name, folder in named.items()}


def flow_path() -> Path:
    """The flow miniature's folder, for ``StableDiffusion3Pipeline.from_pretrained``.

    Call the plain pipeline with ``max_sequence_length=10``, which is what "miniature-flow" does here.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    return EMBEDDED["miniature-flow"].path()


def flow_adapters() -> dict[str, Path]:
    """Folders of the flow miniature's shipped LoRAs by name, sorted; empty where none is shipped.

    Raises:
        FileNotFoundError: the package was installed without its data, or a folder holds no LoRA.
    """
    return EMBEDDED["miniature-flow"].adapters()
