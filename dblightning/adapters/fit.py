"""Whether a LoRA belongs to a denoiser: the base it was trained on, its modules and their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dblightning.adapters.lora import LoraFactors, LoraFile, left_out


def base_name(pipeline: Any) -> str:
    """A short name of the pipeline's origin: the hub id, or the last part of the folder."""
    origin = str(pipeline.config.get("_name_or_path") or "")
    return Path(origin).name if Path(origin).is_dir() else origin


def fingerprint(denoiser: nn.Module, count: int = 16) -> list[float]:
    """Mean |w| of evenly spaced weights of a denoiser: tells base models apart, whatever the precision they are in."""
    named = denoiser.named_parameters()
    weights = [parameter for name, parameter in named if parameter.ndim > 1 and ".lora_" not in name]
    chosen = weights[:: max(1, len(weights) // count)][:count]
    return [round(weight.detach().float().abs().mean().item(), 8) for weight in chosen]


def same_base(first: Sequence[float], second: Sequence[float], tolerance: float = 1e-3) -> bool:
    """Whether two fingerprints are of one base model."""
    same = (abs(a - b) <= tolerance * abs(b) for a, b in zip(first, second, strict=False))
    return len(first) == len(second) and all(same)


def fit(name: str, file: LoraFile, own: Mapping[str, nn.Module]) -> dict[str, LoraFactors]:
    """The file's factors for the denoiser, in its modules' shapes.

    Args:
        name: the adapter's, for messages.
        file: what was read.
        own: the denoiser's modules by name.

    Raises:
        ValueError: no LoRA of a denoiser, or one for another architecture.
    """
    modules = file.modules.get(file.denoiser, {})
    if not any(module in own for module in modules) and (not modules or file.foreign):
        others = left_out(file)
        raise ValueError(
            f"adapter {name!r}: no key of {file.path} starts with '{file.denoiser}.' or 'lora_unet_' or names a "
            f"module of the denoiser, so it holds no denoiser LoRA{f', only {others}' if others else ''}"
        )
    return {module: _fitted(name, file, module, own.get(module), each) for module, each in modules.items()}


def _fitted(name: str, file: LoraFile, module: str, layer: nn.Module | None, factors: LoraFactors) -> LoraFactors:
    base = getattr(layer, "base_layer", layer)
    weight = getattr(base, "weight", None)
    if weight is None:
        raise ValueError(f"adapter {name!r}: {file.path} adapts {module!r}, which this base model does not have")
    if not isinstance(base, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"adapter {name!r}: {file.path} adapts {module!r}, a {type(base).__name__}; only linear layers and 2-D "
            "convolutions can be adapted"
        )
    down, up = factors.down, factors.up
    if down.ndim != weight.ndim and max(down.shape[2:], default=1) == 1 and max(weight.shape[2:], default=1) == 1:
        ones = [1] * (weight.ndim - 2)  # a 1×1 convolution written as a matrix, or a matrix as a 1×1 convolution
        down, up = down.view(*down.shape[:2], *ones), up.view(*up.shape[:2], *ones)
    theirs = (len(up), *down.shape[1:])
    if theirs != tuple(weight.shape) or up.ndim != weight.ndim or max(up.shape[2:], default=1) > 1:
        raise ValueError(
            f"adapter {name!r}: {file.path} was made for another architecture: {module} is "
            f"{'×'.join(map(str, theirs))} there and {'×'.join(map(str, weight.shape))} here"
        )
    return LoraFactors(down, up, factors.alpha, factors.bias, factors.magnitude)


def check_base(name: str, file: LoraFile, denoiser: nn.Module, own: Sequence[float]) -> None:
    """Raises ValueError if a file's metadata name another base than the denoiser, whose fingerprint is ``own``."""
    theirs = file.facts.get("base_fingerprint")
    if theirs is None:
        return
    # half-precision copies of one model differ by 1e-5 in these means and 8-bit ones by 1e-2, another model by more
    eight_bits = any(parameter.element_size() == 1 for parameter in denoiser.parameters())
    if not same_base(theirs, own, 2e-2 if eight_bits else 1e-3):
        raise ValueError(
            f"adapter {name!r} ({file.path}) was trained on another base model, {file.facts.get('base')!r}; "
            "load that base, or pass allow_other_base=True to use it all the same"
        )
