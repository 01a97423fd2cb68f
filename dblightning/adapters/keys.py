"""Keys of LoRA files: the component, the module and the part of the LoRA that each names.

| form | keys | LoRA scale |
|---|---|---|
| diffusers | ``unet.<module>.lora_A.weight``; ``unet.<module>.lora.down.weight``, as TRL writes | header |
| kohya (A1111, ComfyUI) | ``lora_unet_<module with underscores>.lora_down.weight`` | ``.alpha`` per module |
| the same of a transformer (OneTrainer) | ``lora_transformer_<module with underscores>.…`` | the same |
| FLUX's original names | ``lora_unet_double_blocks_0_img_attn_qkv.…``, see :mod:`flux_keys` | ``.alpha`` per module |
| peft | ``base_model.model.<module>.lora_A.weight`` | ``adapter_config.json`` beside the file |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dblightning.adapters.kohya import module_name

#: text encoders' prefixes in kohya's keys; the others are the denoiser's
_TEXT_ENCODERS = {"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
#: what the keys of other models' LoRAs start with
OTHER_MODELS = ("unet", "transformer", "prior", "controlnet", "diffusion_model", "decoder")
_KOHYA = re.compile(r"(lora_unet|lora_transformer|lycoris|lora_te1|lora_te2|lora_te)_([^.]+)\.(.+)")
_PARTS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up",
    "alpha": "alpha", "dora_scale": "dora_scale", "lora_up.bias": "bias", "lora_B.bias": "bias",
}  # fmt: skip
#: endings of dotted keys; the adapter's name may stand in PEFT's, as in a model's own state_dict
_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (r"\.lora_A(\.[^.]+)?\.weight", "down"),
        (r"\.lora_B(\.[^.]+)?\.weight", "up"),
        (r"\.lora_B(\.[^.]+)?\.bias", "bias"),
        (r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", "magnitude"),
        (r"(\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
        (r"(\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.alpha", "alpha"),
    )
)
#: (pattern of a key, what it is) of network types that are not LoRA
_NOT_LORA: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.hada_", "a LoHa (Hadamard product)"),
        (r"\.lokr_", "a LoKr (Kronecker product)"),
        (r"\.lora_mid\.", "a Tucker-decomposed LoRA"),
        (r"\.b?oft_", "an OFT"),
        (r"\.[ab][12]\.weight$", "a GLoRA"),
        (r"\.on_input$", "an IA³"),
        (r"\.diff(_b)?$", "full weight differences"),
        (r"\.[wb]_norm$", "a norm's weights"),
    )
)


def check_lora(keys: Iterable[str], file: Path) -> None:
    """Raises ValueError where a key is of another type of network."""
    for key in keys:
        for pattern, kind in _NOT_LORA:
            if pattern.search(key):
                raise ValueError(f"{file} holds {kind} ({key!r}), which is not LoRA; load a LoRA or DoRA file")


def parse(key: str, file: Path, layers_per_block: int, denoiser: str) -> tuple[str, str, str]:
    """(component, module, part) of a key."""
    check_lora([key], file)
    kohya = _KOHYA.fullmatch(key)
    if kohya:
        prefix, name, ending = kohya.groups()
        if ending not in _PARTS:
            raise ValueError(f"{file} holds {key!r}, which is not part of a LoRA; known endings are {sorted(_PARTS)}")
        if prefix == "lora_transformer" and denoiser != "transformer":
            raise ValueError(_other(file, denoiser, key))
        return _TEXT_ENCODERS.get(prefix, denoiser), module_name(name, layers_per_block), _PARTS[ending]
    plain = key.removeprefix("base_model.model.").replace(".processor.", ".").replace(".base_layer.", ".")
    component, _, rest = plain.partition(".")
    if component in OTHER_MODELS and component != denoiser:
        raise ValueError(_other(file, denoiser, key))
    if component not in (denoiser, "text_encoder", "text_encoder_2"):
        component, rest = denoiser, plain
    for pattern, part in _ENDINGS:
        found = pattern.search(rest)
        if found:
            module = rest[: found.start()]
            if component == denoiser:
                module += ".0" if module.endswith(".to_out") else ""
            else:  # diffusers' first names of the text encoder's projections
                module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
            return component, module, part
    raise ValueError(f"{file} holds {key!r}, which is not part of a LoRA")


def _other(file: Path, denoiser: str, key: str) -> str:
    return (
        f"no key of {file} starts with '{denoiser}.' or 'lora_unet_', so it holds no denoiser LoRA; {key!r} "
        "belongs to another kind of model"
    )


def denoiser_of(keys: Iterable[str]) -> str:
    """The denoiser's name that a file's keys speak of: "transformer", or else "unet"."""
    starts = ("transformer.", "lora_transformer_", "transformer_blocks.", "single_transformer_blocks.")
    return "transformer" if any(key.removeprefix("base_model.model.").startswith(starts) for key in keys) else "unet"
