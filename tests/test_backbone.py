from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from dblightning.adapters import Gating, Segment
from dblightning.backbone import DiffusersBackbone, load_pipeline
from dblightning.blending import Base
from dblightning.noise import ImageNoise
from dblightning.sampling import denoise_loop
from dblightning.solvers import make_solver
from tests.conftest import randomize


def ours(backbone: Any, prompts: list[str], noise: torch.Tensor, negative: Any, guidance: float) -> torch.Tensor:
    solver = make_solver(backbone.scheduler_config, 4, 0.0)
    with torch.no_grad():
        conditioning = backbone.encode(prompts, negative)
        latents = denoise_loop(
            backbone,
            conditioning,
            solver,
            Base(),
            ImageNoise([0] * len(prompts)),
            guidance_scale=guidance,
            latents=noise,
        )
        return backbone.decode(latents)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negative", [None, "a blue star"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_an_image_is_the_one_plain_diffusers_makes(
    request: pytest.FixtureRequest, kind: str, negative: str | None, guidance: float
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    if kind == "sd15":
        plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    else:
        plain = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "a pink cross"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = plain(
        prompts,
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
    ).images
    got = ours(DiffusersBackbone(str(folder)), prompts, noise, negative, guidance)
    # 1e-4: four guided float32 steps, the two guidance halves batched in another order
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-4)


def test_a_prompt_is_encoded_once(backbone: Any) -> None:
    calls = []
    encode = backbone.pipeline.encode_prompt
    backbone.pipeline.encode_prompt = lambda texts, *args, **options: (
        calls.append(texts) or encode(texts, *args, **options)
    )
    first = backbone.encode(["a red circle", "a blue star", "a red circle"])
    second = backbone.encode(["a blue star", "a red circle"])
    assert calls == [["a red circle", "a blue star", ""]]
    assert torch.equal(first.prompt_embeds[[1, 0]], second.prompt_embeds)
    assert torch.equal(first.pooled[0], first.pooled[2])


def test_the_prompt_cache_is_bounded(sd15_folder: Path) -> None:
    backbone = DiffusersBackbone(str(sd15_folder), prompt_cache_size=3)
    for count in range(10):
        backbone.encode([f"{count} stars"])
    assert len(backbone._prompt_cache) <= 3


def test_the_pooled_vector_is_the_text_encoders_end_of_text_state(backbone: Any) -> None:
    tokens = backbone.pipeline.tokenizer(
        ["a red circle"], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = backbone.text_encoder(tokens).pooler_output
    torch.testing.assert_close(backbone.encode(["a red circle"]).pooled, expected)
    assert expected.shape[1] == backbone.pooled_dim


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_give_float32_latents_near_the_full_ones(
    backbone: Any, sd15_folder: Path, dtype: Any
) -> None:
    half = DiffusersBackbone(str(sd15_folder), dtype=dtype)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    got = ours(half, ["a red circle"], noise, None, 3.0)
    assert got.dtype == torch.float32
    # 0.05 of a [0, 1] range: bfloat16 keeps 8 bits
    torch.testing.assert_close(got, ours(backbone, ["a red circle"], noise, None, 3.0), rtol=0, atol=0.05)


def test_both_attention_kernels_give_the_same_image(backbone: Any, sd15_folder: Path) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    eager = DiffusersBackbone(str(sd15_folder), attention="eager")
    assert all(isinstance(each, AttnProcessor) for each in eager.unet.attn_processors.values())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    one, other = (ours(each, ["a red circle"], noise, None, 3.0) for each in (eager, backbone))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_channels_last_is_only_a_memory_layout(backbone: Any, sd15_folder: Path) -> None:
    other = DiffusersBackbone(str(sd15_folder), channels_last=True)
    assert other.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    one, two = (ours(each, ["a red circle"], noise, None, 3.0) for each in (other, backbone))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_the_embedded_miniature_is_a_backbone() -> None:
    backbone = DiffusersBackbone("miniature")
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.resolution == 32


@pytest.mark.parametrize("where", ["./no/such/folder", "miniatur"])
def test_a_missing_model_is_one_sentence_that_says_what_to_do(where: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"--model\.backbone\.init_args\.pretrained"):
        load_pipeline(where)


def test_a_hub_id_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="download it once"):
        load_pipeline("nobody/no-such-model-here")


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDPMPipeline"):
        DiffusersBackbone(str(tmp_path))


def test_a_resolution_the_denoiser_cannot_halve_is_refused(sd15_folder: Path) -> None:
    with pytest.raises(ValueError, match="resolution 20 must be a multiple of 16"):
        DiffusersBackbone(str(sd15_folder), resolution=20)


def test_prompts_must_be_a_list(backbone: Any) -> None:
    with pytest.raises(TypeError, match="pass \\[prompt\\]"):
        backbone.encode("a red circle")
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        backbone.encode(["a", "b"], ["c"])


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_a_compiled_denoiser_is_traced_without_a_break_and_computes_the_same(
    sd15_folder: Path, what: Literal["blocks", "whole"]
) -> None:
    """fullgraph refuses any break; the "eager" backend runs what was traced, with no minutes of code generation."""
    torch.compiler.reset()
    backbone = DiffusersBackbone(str(sd15_folder))
    for seed, name in enumerate(("one", "two")):
        backbone.adapters.add(name, rank=2 + seed, seed=seed)
        randomize(backbone.adapters, name, seed, 0.2)
    latents = torch.randn(3, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = (latents, torch.tensor([10, 500, 900]), backbone.encode(["a", "b", "c"]), 2.0)
    gates = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 0.0]])

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = [
                backbone.denoise(*arguments, use)  # type: ignore[arg-type]
                for use in (
                    Gating(),
                    Gating(gates),
                    Gating(merged=(0.5, 0.5)),
                    Gating(merged=(1.0, 0.0)),
                    Gating(segments=(Segment((1.0, 0.0), 1), Segment((0.0, 0.0), 2))),
                )
            ]
        backbone.adapters.train_only("two")
        parameters = backbone.adapters.parameters("two")
        return found + list(torch.autograd.grad(backbone.denoise(*arguments, gates=gates).square().mean(), parameters))

    expected = outputs()
    backbone.compile_denoiser(what, backend="eager", fullgraph=True)
    for got, plain in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # another adapter state: nothing may be frozen into what was traced
        backbone.adapters.parameters("one")[1].mul_(2)
    changed = outputs()
    for module in backbone.unet.modules():
        module._compiled_call_impl = None  # as before `compile`
    for got, plain in zip(changed, outputs(), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(changed[1], expected[1])


def test_compile_takes_no_other_word(sd15_folder: Path) -> None:
    with pytest.raises(ValueError, match="none, blocks or whole"):
        DiffusersBackbone(str(sd15_folder), compile="everything")  # type: ignore[arg-type]
