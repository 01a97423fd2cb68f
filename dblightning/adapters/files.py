"""LoRA files: metadata, key names, and what tells base models apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "dblightning"


def _with_peft_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's keys with PEFT's endings; TRL and older diffusers write ``lora.up`` and ``to_q_lora.up``."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    old = {key for key in state if "lora.up." in key or "lora.down." in key}
    renamed = convert_unet_state_dict_to_peft({key: state[key] for key in old})
    return {key: tensor for key, tensor in state.items() if key not in old} | renamed


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The facts :meth:`AdapterBank.export` put into an adapter's file (or folder); {} for a foreign file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error}); export the adapter again") from error
    return json.loads(header.get(METADATA_KEY, "{}"))


def base_name(pipeline: Any) -> str:
    """A short name of the pipeline's origin: the hub id, or the last part of the folder."""
    origin = str(pipeline.config.get("_name_or_path") or "")
    return Path(origin).name if Path(origin).is_dir() else origin


def fingerprint(unet: nn.Module, count: int = 16) -> list[float]:
    """Mean |w| of evenly spaced weights of a denoiser: tells base models apart, whatever the precision they are in."""
    weights = [parameter for name, parameter in unet.named_parameters() if parameter.ndim > 1 and ".lora_" not in name]
    chosen = weights[:: max(1, len(weights) // count)][:count]
    return [round(weight.detach().float().abs().mean().item(), 8) for weight in chosen]


def _jsonable(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
