"""The shipped flow miniature, against plain diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from torch import Tensor

from dblightning import miniature
from dblightning.backbone import DiffusersBackbone
from dblightning.backbone.transformer import StableDiffusion3
from dblightning.miniature import world
from dblightning.miniature.rewards import ShapeAlignment
from dblightning.pipeline import DiffusionBlendPipeline

PROMPTS = world.test_prompts()[:32]


@pytest.fixture(scope="module")
def plain() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(miniature.flow_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours() -> DiffusionBlendPipeline:
    pipeline = DiffusionBlendPipeline.from_pretrained("miniature-flow")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: Any, prompts: list[str], **options: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
    return torch.as_tensor(pipeline(prompts, generator=generators, **settings, **options).images)


def test_plain_diffusers_draws_our_base_models_images(plain: Any, ours: DiffusionBlendPipeline) -> None:
    assert isinstance(ours.backbone.family, StableDiffusion3)
    expected = images(plain, PROMPTS[:4], max_sequence_length=10)
    torch.testing.assert_close(images(ours, PROMPTS[:4], method="base"), expected, rtol=0, atol=1e-4)
    longer = images(plain, PROMPTS[:2])  # the plain pipeline's own 256 tokens
    torch.testing.assert_close(
        images(ours, PROMPTS[:2], method="base", max_sequence_length=256), longer, rtol=0, atol=1e-4
    )
    assert (longer - expected[:2]).abs().max() > 1e-3


def test_plain_diffusers_draws_our_adapters_images(plain: Any, ours: DiffusionBlendPipeline) -> None:
    for name, folder in miniature.flow_adapters().items():
        plain.load_lora_weights(str(folder), adapter_name=name)
        plain.set_adapters([name])
        expected = images(plain, PROMPTS[:2], max_sequence_length=10)
        torch.testing.assert_close(images(ours, PROMPTS[:2], weights={name: 1.0}), expected, rtol=0, atol=1e-4)
        plain.delete_adapters(name)


@pytest.mark.parametrize("tokens", [pytest.param(10, marks=pytest.mark.slow), 256])
def test_it_draws_the_colours_its_prompt_asks_for_at_either_number_of_t5s_tokens(plain: Any, tokens: int) -> None:
    made, reward = images(plain, PROMPTS, max_sequence_length=tokens), ShapeAlignment()
    others = torch.stack([reward.score(made, PROMPTS[k:] + PROMPTS[:k]) for k in range(1, 32)]).mean(0)
    # 1.0 apart over 200 test prompts; 32 images of standard deviation 0.9 leave 0.15 of standard error
    assert reward.score(made, PROMPTS).mean() > others.mean() + 0.5


def test_the_weights_are_half_precision_of_at_most_six_megabytes_and_load_as_float32(plain: Any) -> None:
    files = list(miniature.flow_path().rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 6_000_000
    for file in [*files, *(found for each in miniature.flow_adapters().values() for found in each.glob("*"))]:
        with safe_open(file, "pt") as opened:
            assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}, file  # noqa: SIM118
    for part in (plain.transformer, plain.vae, plain.text_encoder, plain.text_encoder_2, plain.text_encoder_3):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert "Apache License" in (miniature.flow_path() / "LICENSE").read_text()
    assert "pretrain-flow-miniature" in (miniature.flow_path() / "PROVENANCE.md").read_text()


def test_t5_is_silent_and_the_backbone_gives_it_the_tokens_of_training() -> None:
    backbone = DiffusersBackbone("miniature-flow")
    embeds = backbone.encode(PROMPTS[:2]).prompt_embeds
    assert embeds.shape[1] == 20 and not embeds[:, 10:].any() and embeds[:, :10].any()
    assert (
        DiffusersBackbone("miniature-flow", max_sequence_length=256).encode(PROMPTS[:1]).prompt_embeds.shape[1] == 266
    )
