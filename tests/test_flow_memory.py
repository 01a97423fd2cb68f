"""The memory that docs/models.md states of SD3.5 and FLUX, computed from the true architectures.

No weights exist: the models are built on torch's meta device from their published configurations.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
#: parameters of the text encoders and the VAE, billions: CLIP-L, OpenCLIP-G, T5-XXL's encoder, 16-channel VAE
CLIP_L, CLIP_G, T5, VAE = 0.123, 0.695, 4.762, 0.084


def sd35_medium() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def flux_dev() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def computed(group: str) -> dict[str, float]:
    """GB of a run of ``configs/<group>``: weights in half precision, the LoRA, activations of one micro-batch.

    The LoRA is float32 with its gradient and Adam's two moments. Activations with gradient checkpointing: one input per
    block and row, and what one block keeps while it is recomputed, about 34 values per token and channel (Korthikanti
    et al. 2022, without the attention matrix). Rewards and the CUDA context are not counted.
    """
    from dblightning.backbone import Flux, StableDiffusion3

    with torch.device("meta"):
        model = sd35_medium() if group == "sd35" else flux_dev()
    family: Any = StableDiffusion3 if group == "sd35" else Flux
    settings = yaml.safe_load((ROOT / f"configs/{group}/pickscore.yaml").read_text())["model"]
    rank, batch = settings["adapter"]["rank"], settings["optimisation"]["batch_size"]
    adapted = [
        module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(f".{each}" for each in family.target_modules))
    ]  # fmt: skip
    lora = sum(rank * (module.in_features + module.out_features) for module in adapted)
    blocks = [module for module in model.modules() if type(module).__name__ in family.repeated_blocks]
    width = model.config.num_attention_heads * model.config.attention_head_dim
    tokens = (512 // 16) ** 2 + (77 + 256 if group == "sd35" else 512)
    rows = batch * (2 if settings["sampling"]["guidance_scale"] > 1 and group == "sd35" else 1)
    text = CLIP_L + CLIP_G + T5 if group == "sd35" else CLIP_L + T5
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        "lora": lora / 1e6,
        "weights": 2 * (sum(parameter.numel() for parameter in model.parameters()) / 1e9 + text + VAE),
        "without T5": 2 * (sum(parameter.numel() for parameter in model.parameters()) / 1e9 + text - T5 + VAE),
        "optimiser": 16 * lora / 1e9,
        "activations": 2 * rows * tokens * width * (len(blocks) + 34) / 1e9,
    }


@pytest.mark.parametrize(("group", "row"), [("sd35", "SD3.5-Medium"), ("flux", "FLUX.1-dev")])
def test_the_memory_in_the_docs_is_what_is_computed(group: str, row: str) -> None:
    facts = computed(group)
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    cells = [float(re.sub(r"[^\d.]", "", cell)) for cell in line.split("|")[2:-1]]
    total = facts["weights"] + facts["optimiser"] + facts["activations"]
    expected = [facts[name] for name in ("parameters", "lora", "weights", "without T5", "optimiser", "activations")]
    # the docs round to two digits
    assert cells == pytest.approx([*expected, total], rel=0.05), [*expected, total]
