"""A LoRA in memory, whatever form its file has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class LoraFactors:
    """One module's low-rank update, (alpha / r) B A, in the file's own precision."""

    down: Tensor  # A: (r, in), of a convolution (r, in, kh, kw)
    up: Tensor  # B: (out, r) or (out, r, 1, 1)
    alpha: float  # the scale times r
    bias: Tensor | None = None  # lora_bias: (out,)
    magnitude: Tensor | None = None  # DoRA: (out,)

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return len(self.down)


@dataclass
class LoraFile:
    """A LoRA, whatever form its file has.

    Attributes:
        modules: component (``denoiser``, "text_encoder", "text_encoder_2") → module → factors.
        facts: what :meth:`AdapterBank.export` noted; {} for a foreign file.
        header: the file's other metadata.
        path: where it was read.
        assumed: why the scale is a guess, "" where it is known.
        foreign: no key says that it is a denoiser's.
        denoiser: the denoiser's name in ``modules``, which its keys in diffusers' form start with.
    """

    modules: dict[str, dict[str, LoraFactors]]
    facts: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    assumed: str = ""
    foreign: bool = False
    denoiser: str = "unet"


def lora_config(modules: Mapping[str, LoraFactors], every: Iterable[str] = ()) -> dict[str, Any]:
    """PEFT's settings of a LoRA, as arguments of ``LoraConfig``.

    Args:
        modules: module → factors.
        every: names of all modules of the model, to name the targets by their endings where those say the same.
    """
    rank = Counter(each.rank for each in modules.values()).most_common(1)[0][0]
    alpha = Counter(each.alpha for each in modules.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_exactly(name): each.rank for name, each in modules.items() if each.rank != rank},
        "alpha_pattern": {_exactly(name): _number(each.alpha) for name, each in modules.items() if each.alpha != alpha},
        "target_modules": _targets(modules, every),
        "use_dora": any(each.magnitude is not None for each in modules.values()),
        "lora_bias": any(each.bias is not None for each in modules.values()),
    }


def _exactly(module: str) -> str:
    return "^" + re.escape(module)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _targets(modules: Iterable[str], every: Iterable[str]) -> list[str]:
    wanted = set(modules)
    endings = sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in wanted})  # type: ignore[index]
    matched = {name for name in every if any(name == each or name.endswith("." + each) for each in endings)}
    return endings if matched == wanted else sorted(wanted)


def left_out(file: LoraFile) -> str:
    """Parts of a file that are not the denoiser's, in words; "" for nothing."""
    others = {component: len(found) for component, found in file.modules.items() if component != file.denoiser}
    return " and ".join(f"{count} modules of the {component}" for component, count in others.items())


def two_text_encoders(lora: LoraFile) -> bool:
    """Whether a LoRA's model is SDXL: there is a second text encoder, or cross-attention reads 2,048 channels."""
    denoiser = lora.modules.get(lora.denoiser, {})
    wide = any(
        name.endswith(("attn2.to_k", "attn2.to_v")) and each.down.shape[1] == 2048 for name, each in denoiser.items()
    )
    return wide or "text_encoder_2" in lora.modules


def peft_tensors(module: str, each: LoraFactors) -> dict[str, Tensor]:
    """A module's tensors by PEFT's keys."""
    found = {f"{module}.lora_A.weight": each.down, f"{module}.lora_B.weight": each.up}
    if each.bias is not None:
        found[f"{module}.lora_B.bias"] = each.bias
    if each.magnitude is not None:
        shape = (1, -1, 1, 1) if each.down.ndim == 4 else (-1,)
        found[f"{module}.lora_magnitude_vector"] = each.magnitude.view(shape)
    return found
