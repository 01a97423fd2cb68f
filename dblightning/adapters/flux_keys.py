"""FLUX LoRAs under the original code's module names, with fused projections: read by diffusers' own converter.

``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` (sd-scripts, A1111) and
``diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`` (ComfyUI, ai-toolkit).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

_BLOCK = re.compile(r"(?:lora_unet_|diffusion_model\.)(?:double|single)_blocks[._]\d")


def is_original_flux(keys: Iterable[str]) -> bool:
    """Whether a file's keys name FLUX's blocks as the original code does."""
    return any(_BLOCK.match(key) for key in keys)


def diffusers_flux_tensors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The same LoRA in diffusers' keys, its scale folded into the factors.

    A fused matrix's parts share the down matrix, each with its rows of the up matrix.

    Raises:
        ValueError: keys that the converter does not know; ``file`` is named.
    """
    from diffusers import FluxPipeline

    kohya = {
        re.sub(r"\.lora_A\.weight$", ".lora_down.weight", re.sub(r"\.lora_B\.weight$", ".lora_up.weight", key)): tensor
        for key, tensor in tensors.items()
    }
    try:
        converted: dict[str, Tensor] = FluxPipeline.lora_state_dict(kohya)
    except (ValueError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"diffusers cannot convert the FLUX LoRA {file} from the original names: {reason}") from error
    # a copy each: safetensors refuses to write tensors that share memory
    return {key: tensor.clone() for key, tensor in converted.items()}
