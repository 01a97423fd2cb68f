from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dblightning import miniature
from dblightning.arguments import paths_by_name
from dblightning.backbone import DiffusersBackbone
from dblightning.miniature import world
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment, compressibility
from dblightning.module import RewardRLModule


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(miniature.path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PROMPTS = world.test_prompts()[:40]


@pytest.fixture(scope="module")
def images(pipeline: StableDiffusionPipeline) -> Tensor:
    return pipeline(
        PROMPTS,
        num_inference_steps=20,
        guidance_scale=3.0,
        eta=1.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        output_type="pt",
    ).images


def test_the_shipped_pipeline_draws_what_its_prompt_asks_for(images: Tensor) -> None:
    reward = ShapeAlignment()
    requested = reward.score(images, PROMPTS)
    others = torch.stack([reward.score(images, PROMPTS[k:] + PROMPTS[:k]) for k in range(1, 40)]).mean(0)
    # 0.97 ± 0.06 apart over all 300 test prompts; a model deaf to its prompt would be 0 apart, and 40 images of
    # standard deviation 1.1 leave 0.17 of standard error, so 0.5 is about three of them from either
    assert requested.mean() > others.mean() + 0.5


def test_compressibility_is_in_standard_deviations_of_the_base_models_samples(images: Tensor) -> None:
    scores = compressibility().score(images, PROMPTS)
    # 40 draws of mean 0 and deviation 1: four standard errors are 0.63 for the mean and 0.45 for the deviation
    assert abs(scores.mean()) < 0.63
    assert abs(scores.std() - 1) < 0.45


def test_the_shipped_weights_are_a_few_megabytes_of_half_precision(pipeline: StableDiffusionPipeline) -> None:
    files = list(miniature.path().rglob("*.safetensors"))
    parameters = sum(
        parameter.numel()
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for parameter in part.parameters()
    )
    stored = sum(file.stat().st_size for file in files)
    # two bytes a number, and headers that name a few hundred tensors
    assert 2 * parameters <= stored < 2 * parameters + 200_000
    assert stored < 5_000_000
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):  # and load as float32, all of them
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_weights_come_with_licence_and_provenance() -> None:
    assert "Apache License" in (miniature.path() / "LICENSE").read_text()
    assert "pretrain-miniature" in (miniature.path() / "PROVENANCE.md").read_text()


def test_missing_package_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniature, "_FOLDER", tmp_path)
    for ask in (miniature.path, miniature.adapters):
        with pytest.raises(FileNotFoundError, match="reinstall dblightning"):
            ask()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_index.json").write_text("{}")
    assert miniature.adapters() == {}
    for name in ("b", "a"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "pytorch_lora_weights.safetensors").touch()
    assert list(miniature.adapters()) == ["a", "b"]
    (tmp_path / "adapters" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        miniature.adapters()


def test_a_shipped_adapter_has_a_name_that_settings_can_use(tmp_path: Path) -> None:
    assert miniature.adapter_folder("miniature:alignment") == miniature.adapters()["alignment"]
    assert miniature.adapter_folder("miniature:0.1/alignment") == miniature.adapters("0.1")["alignment"]
    assert miniature.adapters("0.1")["alignment"] != miniature.adapters()["alignment"]
    assert sorted(miniature.adapters("one-alpha")) == ["aesthetic", "alignment"]
    assert miniature.adapter_folder("miniature:one-alpha/aesthetic") != miniature.adapters()["aesthetic"]
    assert miniature.adapter_folder(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="ships no adapter 'sharpness' as of 0.1; it has"):
        miniature.adapter_folder("miniature:0.1/sharpness")
    with pytest.raises(ValueError, match="got version '0.0'"):
        miniature.adapters("0.0")


def test_training_starts_from_a_shipped_adapter_by_its_name() -> None:
    shipped = "miniature:one-alpha/alignment"
    run = RewardRLModule(DiffusersBackbone("miniature"), ShapeAesthetic(), adapter={"name": "a", "init": shipped})
    assert run.settings.adapter.rank == 16 and run.settings.adapter.init == shipped
    other = DiffusersBackbone("miniature").adapters
    other.load("b", miniature.adapters("one-alpha")["alignment"], None)
    pairs = zip(run.backbone.adapters.parameters("a"), other.parameters("b"), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_finding_the_folders_needs_no_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({miniature.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_adapters_by_name_stand_beside_paths() -> None:
    named = paths_by_name(["a=miniature:one-alpha/aesthetic", "b=runs/b"])
    assert miniature.adapter_paths(named) == {"a": miniature.adapters("one-alpha")["aesthetic"], "b": Path("runs/b")}
    with pytest.raises(ValueError, match="ships no adapter 'sharpness'"):
        miniature.adapter_paths(paths_by_name(["a=miniature:sharpness"]))
