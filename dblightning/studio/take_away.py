"""What a visitor takes along: a preset, lines for plain diffusers, the blend's soup as one LoRA file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dblightning.adapters.files import write_lora
from dblightning.adapters.lora import LoraFactors, LoraFile
from dblightning.adapters.soup import soup_lora
from dblightning.miniature import EMBEDDED
from dblightning.pipeline import DiffusionBlendPipeline
from dblightning.preset import Preset
from dblightning.shared_pipeline import SharedPipeline

#: the file's name, which ``load_lora_weights(folder)`` looks for
LORA_NAME = "pytorch_lora_weights.safetensors"


def plain_weights(preset: Preset) -> dict[str, float]:
    """The weights of a preset that a file can hold.

    Raises:
        ValueError: none, or weights that change over the steps.
    """
    if preset.weights is None:
        raise ValueError("The base model has no adapter to write.")
    if not isinstance(preset.weights, Mapping):
        raise ValueError("Weights that change over the steps are no single LoRA.")
    return {name: value for name, value in preset.weights.items() if value}


def merged_lora(shared: SharedPipeline, preset: Preset, folder: Path) -> Path:
    """Write λ Σᵢ wᵢ ΔWᵢ as one LoRA in diffusers' form: the exact Rewarded Soup, DB-MPA's first order in ΔW.

    Args:
        shared: the pipeline with the adapters.
        preset: weights and λ.
        folder: where a folder of its own is made; equal presets write the same file.

    Raises:
        ValueError: weights that no LoRA can hold, or a DoRA among the adapters.
    """
    weights = plain_weights(preset)
    with shared.alone() as pipe:
        parts = {name: _scaled(pipe, name, preset.kl_scale) for name in weights}
    soup = soup_lora(parts, weights)
    soup.lora.facts["kl_scale"] = preset.kl_scale
    digest = hashlib.sha256(repr((sorted(weights.items()), preset.kl_scale)).encode()).hexdigest()[:12]
    return write_lora(folder / digest / LORA_NAME, soup.lora)


def _scaled(pipe: DiffusionBlendPipeline, name: str, scale: float) -> LoraFile:
    """An adapter with its ΔW times ``scale``."""
    prefix = pipe.adapters.prefix
    factors = {
        module: LoraFactors(each.down, each.up, each.alpha * scale, each.bias, each.magnitude)
        for module, each in pipe.adapters.factors(name).items()
    }
    return LoraFile({prefix: factors}, {"adapter": name}, denoiser=prefix)


def diffusers_lines(pipe: DiffusionBlendPipeline, preset: Preset, prompt: str, file: str = LORA_NAME) -> str:
    """Three lines of plain diffusers that make the soup's image, after their imports.

    Args:
        pipe: the pipeline, for its class and scheduler.
        preset: settings.
        prompt: the text.
        file: the merged LoRA.
    """
    kind = type(pipe.backbone.pipeline).__name__
    shipped = preset.base in EMBEDDED
    base = f"miniature.EMBEDDED[{preset.base!r}].path()" if shipped else repr(preset.base)
    guidance = "" if preset.guidance_scale is None else f", guidance_scale={preset.guidance_scale:g}"
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {kind}",
            *(["from dblightning import miniature"] if shipped else []),
            "",
            f"pipe = {kind}.from_pretrained({base})",
            f"pipe.load_lora_weights({file!r})",
            f"image = pipe({prompt!r}, num_inference_steps={preset.num_inference_steps}{guidance}, "
            f"generator=torch.Generator().manual_seed({preset.seed or 0})).images[0]",
        ]
    )
