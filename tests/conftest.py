"""Fixtures: tiny pipelines of the true classes with random weights, built once per run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# read once, when huggingface_hub is first imported: no test waits for a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5's classes and block types at reduced width, random weights, saved by diffusers: 16×16 images."""
    from tests.tiny_pipelines import save_sd15

    return save_sd15(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's classes at reduced width: two text encoders, added time ids, transformer depth 1 and 2."""
    from tests.tiny_pipelines import save_sdxl

    return save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3's classes at reduced width, with T5."""
    from tests.tiny_pipelines import save_sd3

    return save_sd3(tmp_path_factory.mktemp("models") / "sd3")


def randomize(bank: Any, name: str, seed: int, scale: float = 0.1) -> None:
    """Give an adapter an effect: random B matrices (PEFT starts them at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in bank.layers():
            if name in layer.lora_B:
                weight = layer.lora_B[name].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


@pytest.fixture
def backbone(sd15_folder: Path) -> Any:
    """A fresh reduced-width SD 1.5 backbone without adapters."""
    from dblightning.backbone import DiffusersBackbone

    return DiffusersBackbone(str(sd15_folder))
