from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dblightning.adapters import read_metadata
from dblightning.callbacks import BeforeAfterGrid, ExportAdapter, SampleGrid
from tests.callbacks.fitting import fit


def events(tmp_path: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(tmp_path / "log"), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_the_run_logs_rewards_kl_and_grids_to_tensorboard(backbone: Any, tmp_path: Path) -> None:
    fit(backbone, tmp_path, [SampleGrid(every_n_rollouts=2, max_images=2)])
    seen = events(tmp_path)
    scalars = set(seen.Tags()["scalars"])
    assert {"train/reward", "train/reward_std", "train/kl", "train/ratio", "train/clip_fraction"} <= scalars
    assert {
        "prompt/a red circle",
        "prompt/a blue star",
        "time/images_per_s",
        "time/device_s_per_image",
        "train/grad_norm",
    } <= scalars
    assert [event.step for event in seen.Scalars("train/reward")] == [0, 1, 2, 3]
    assert [event.step for event in seen.Images("samples")] == [1, 2, 4]


def test_the_adapter_is_exported_in_between_and_at_the_end(backbone: Any, tmp_path: Path) -> None:
    module = fit(backbone, tmp_path, [ExportAdapter(str(tmp_path / "lora"), every_n_epochs=1)])
    facts = read_metadata(tmp_path / "lora")
    assert facts["rollouts"] == 4
    assert facts["images"] == 8
    assert facts["hyperparameters"]["num_inference_steps"] == 2
    assert facts["command"].startswith("python -m dblightning")
    assert read_metadata(tmp_path / "lora-epoch1")["rollouts"] == 2
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    own = module.backbone.adapters.state_dict(module.adapter_name)
    assert {key.removeprefix("unet.") for key in saved} == set(own)
    assert all(torch.equal(saved[f"unet.{key}"], value) for key, value in own.items())


def test_the_before_after_picture_is_written_and_logged(backbone: Any, tmp_path: Path) -> None:
    fit(backbone, tmp_path, [BeforeAfterGrid(num_prompts=2, path=str(tmp_path / "picture.png"))])
    assert Image.open(tmp_path / "picture.png").size[0] > 100
    assert "before_after" in events(tmp_path).Tags()["images"]


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SampleGrid(every_n_rollouts=0)
