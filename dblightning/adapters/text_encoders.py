"""Adapters that other programs put on text encoders."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer


def silence_text_adapters(pipeline: Any) -> None:
    """Switch off, with a warning, the adapters on a pipeline's text encoders.

    Prompts are encoded once for all methods, "base" among them, so an adapter left on would be part of every image.

    Raises:
        ValueError: an adapter is fused into a text encoder's weights.
    """
    for component in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder: Any = getattr(pipeline, component, None)
        if not getattr(encoder, "peft_config", None):
            continue
        layers = [module for module in encoder.modules() if isinstance(module, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError(
                f"a LoRA is fused into the {component}, where every method would use it; call unfuse_lora() first"
            )
        active = [layer for layer in layers if not layer.disable_adapters]
        if not active:
            continue
        for layer in active:
            layer.enable_adapters(False)
        warnings.warn(
            f"the {component}'s adapters {sorted(encoder.peft_config)} are switched off: adapters here are the "
            "denoiser's alone, so images differ from plain diffusers', which adapts the text encoder too",
            stacklevel=3,
        )
