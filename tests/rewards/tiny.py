"""Small models of the true classes, written to disk in the published formats."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.rewards.image_reward_cases import SIZES, VOCABULARY, picture

HERE = Path(__file__).parent

#: transformers' configuration of a CLIP model small enough for a test; the vocabulary is the real one
CLIP_CONFIG = {
    "projection_dim": 24,
    "logit_scale_init_value": 4.6,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    },
}

#: the same sizes as open_clip writes them, for the rewards published in its format
OPEN_CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "mlp_ratio": 2.5, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2.5},
}


def pictures(count: int, height: int = 48, width: int = 48) -> Tensor:
    """8-bit test pictures as float images (count, 3, height, width)."""
    arrays = np.stack([picture(index, height, width) for index in range(count)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def reference_pictures() -> list[Tensor]:
    """The pictures of ``image_reward_cases``, each (1, 3, H, W)."""
    return [
        torch.from_numpy(picture(index, *size)).permute(2, 0, 1)[None].float() / 255 for index, size in enumerate(SIZES)
    ]


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights that let the input through: matrices of unit gain, biases and norms that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("logit_scale"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                # not added to what is there: some initial values are the global generator's
                parameter.copy_(0.2 * noise + float(name.endswith("weight")))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def save_huggingface_clip(folder: Path, activation: str = "gelu", seed: int = 0) -> Path:
    """A folder as PickScore or openai/clip-vit-large-patch14 are published: config.json and model.safetensors."""
    from transformers import CLIPConfig, CLIPModel

    config = json.loads(json.dumps(CLIP_CONFIG))
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = activation
    model = CLIPModel(CLIPConfig(**config))
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def save_hps(folder: Path, seed: int = 1) -> Path:
    """``HPS_v2.1_compressed.pt``: open_clip's state dict inside a dict."""
    import open_clip

    model = open_clip.CLIP(**OPEN_CLIP_CONFIG)
    randomise(model, seed)
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder


def save_aesthetic_head(folder: Path, features: int = 24, seed: int = 2) -> Path:
    """``sac+logos+ava1-l14-linearMSE.pth``: five linear layers, dropout between."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (features, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for index, (inputs, outputs) in sizes.items():
        state[f"layers.{index}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        state[f"layers.{index}.bias"] = torch.randn(outputs, generator=generator)
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


def image_reward_state(fixture: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict that the image-reward package was loaded with, under the package's own keys."""
    state = {}
    for name, array in fixture.items():
        key = name.removeprefix("weight/")
        if not name.startswith("weight/") or key.endswith(("/scale", "/offset")):
            continue
        if f"{name}/scale" in fixture:
            value = array.astype(np.float32) * fixture[f"{name}/scale"] + fixture.get(f"{name}/offset", 0)
            state[key] = torch.from_numpy(value.astype(np.float32))
        else:
            state[key] = torch.from_numpy(array)
    return state


def save_image_reward(folder: Path, fixture: dict[str, np.ndarray]) -> Path:
    """A folder with ``ImageReward.pt`` and the vocabulary of its tokenizer."""
    folder.mkdir(exist_ok=True)
    torch.save(image_reward_state(fixture), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


def vila_parameters(fixture: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """VILA-R's parameters under praxis' names."""
    return {name.removeprefix("param/"): array for name, array in fixture.items() if name.startswith("param/")}


def published(variable: str) -> Path:
    """The folder of published weights that an environment variable names; the test is skipped where it is not set."""
    if variable not in os.environ:
        pytest.skip(f"set {variable} to the folder of the published weights; docs/rewards.md says what it holds")
    return Path(os.environ[variable])
