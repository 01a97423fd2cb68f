"""Small reward models, written once per run in the published formats. Nothing here or below touches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rewards import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward_models")


@pytest.fixture(scope="session")
def image_reward_fixture() -> dict[str, np.ndarray]:
    """Weights, scores and gradient from the image-reward package; see ``make_image_reward_fixture.py``."""
    return dict(np.load(tiny.HERE / "image_reward_tiny.npz"))


@pytest.fixture(scope="session")
def image_reward_folder(models: Path, image_reward_fixture: dict[str, np.ndarray]) -> Path:
    return tiny.save_image_reward(models / "image_reward", image_reward_fixture)


@pytest.fixture(scope="session")
def clip_folder(models: Path) -> Path:
    return tiny.save_huggingface_clip(models / "clip")


@pytest.fixture(scope="session")
def quick_gelu_folder(models: Path) -> Path:
    return tiny.save_huggingface_clip(models / "clip_quick_gelu", "quick_gelu", seed=3)


@pytest.fixture(scope="session")
def hps_folder(models: Path) -> Path:
    return tiny.save_hps(models / "hps")


@pytest.fixture(scope="session")
def aesthetic_folder(models: Path) -> Path:
    return tiny.save_aesthetic_head(models / "aesthetic")


@pytest.fixture(scope="session")
def vila_fixture() -> dict[str, np.ndarray]:
    """Weights, scores and gradient computed with praxis layers."""
    return dict(np.load(tiny.HERE / "vila_tiny.npz"))


@pytest.fixture(scope="session")
def vila_file(models: Path, vila_fixture: dict[str, np.ndarray]) -> Path:
    from dblightning.rewards.vila_model import from_praxis, save_vila

    save_vila(from_praxis(tiny.vila_parameters(vila_fixture)), models / "vila.safetensors")
    return models / "vila.safetensors"


@pytest.fixture
def make_reward(
    image_reward_folder: Path,
    clip_folder: Path,
    quick_gelu_folder: Path,
    hps_folder: Path,
    aesthetic_folder: Path,
    vila_file: Path,
) -> Callable[..., torch.nn.Module]:
    """A small reward by registry name."""
    from dblightning.rewards import build_reward

    options = {
        "image_reward": {"weights": image_reward_folder},
        "pickscore": {"weights": clip_folder},
        "hpsv2": {"weights": hps_folder, "architecture": tiny.OPEN_CLIP_CONFIG},
        "aesthetic": {"weights": aesthetic_folder, "clip_weights": quick_gelu_folder},
        "clip_score": {"weights": clip_folder, "clamp": False},
        "vila": {"weights": vila_file},
        "jpeg": {"offset_kb": 2.0, "scale_kb": 1.0},
    }

    def make(name: str, **more: object) -> torch.nn.Module:
        return build_reward(name, **{**options[name], **more})

    return make
