from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch.nn import functional as F

from dblightning.miniature import pretrain_flow, world

TINY = ["--images", "24", "--batch", "4", "--steps", "2", "--clean-steps", "1", "--snapshot-minutes", "1000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flow") / "pipeline"
    pretrain_flow.main([*TINY, "--out", str(out)])
    return out


def test_a_tiny_budget_runs_to_a_folder_that_plain_diffusers_loads_and_refuses_to_start_over(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("A red colored circle.", num_inference_steps=2, max_sequence_length=10, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert pipeline.scheduler.config.shift == 1.0
    with pytest.raises(SystemExit):  # an earlier run is not overwritten
        pretrain_flow.main([*TINY, "--out", str(folder)])
    with pytest.raises(ValueError, match="of a run of 2 steps, not 3"):
        pretrain_flow.main([*TINY, "--out", str(folder), "--steps", "3", "--resume"])
    with pytest.raises(ValueError, match="holds 24 images, not 25"):
        pretrain_flow.main([*TINY, "--out", str(folder), "--images", "25", "--resume"])


def test_the_text_of_training_is_the_plain_pipelines(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    prompts = ["A red colored circle.", "A blue ring and an orange star."]
    expected, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=10
    )
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=10, return_tensors="pt").input_ids
    with torch.no_grad():
        tokens, found = pretrain_flow.encode_text((pipeline.text_encoder, pipeline.text_encoder_2), ids)
    assert torch.equal(found, pooled)
    assert torch.equal(tokens[:, :-1], expected[:, :10])
    assert not expected[:, 10:].any() and expected.shape[1] == 20  # T5's are zero
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("times", [10, 256])
def test_one_token_counted_often_is_that_many_equal_tokens(folder: Path, times: int) -> None:
    transformer = StableDiffusion3Pipeline.from_pretrained(folder).transformer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():  # the modulations start at zero and would hide the attention
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    x, pooled = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 96, generator=generator)
    embeds = torch.randn(2, 10, 96, generator=generator)
    sigmas = torch.tensor([300.0, 700.0])
    with torch.no_grad():
        expected = transformer(x, F.pad(embeds, (0, 0, 0, times)), pooled, sigmas).sample
        with pretrain_flow.last_token_counted(16 + 11, times):
            got = transformer(x, F.pad(embeds, (0, 0, 0, 1)), pooled, sigmas).sample
        plain = transformer(x, F.pad(embeds, (0, 0, 0, 1)), pooled, sigmas).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


def test_the_loss_is_least_at_the_velocity_of_the_data() -> None:
    clean = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    class Exact:
        """The velocity of data that is one point: ε − x₀ = (x − x₀)/σ."""

        def __call__(self, noisy: torch.Tensor, embeds: object, pooled: object, times: torch.Tensor) -> object:
            sample = (noisy - clean) / (times / 1000).view(-1, 1, 1, 1)
            return type("Output", (), {"sample": sample})

    tokenizer = pretrain_flow.load_tokenizer()
    encoders = [pretrain_flow.build_text_encoder(tokenizer, width, 2) for width in pretrain_flow.CLIP_WIDTHS]
    ids = torch.zeros(3, pretrain_flow.MAX_LENGTH, dtype=torch.long)
    loss = pretrain_flow.velocity_loss(Exact(), encoders, clean, ids, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert loss < 1e-6


def test_every_caption_of_the_world_fits_and_careless_ones_have_rows_of_their_own() -> None:
    tokenizer = pretrain_flow.load_tokenizer()
    texts = world.train_prompts() + world.test_prompts()
    assert max(len(tokenizer(text).input_ids) for text in texts) <= pretrain_flow.MAX_LENGTH
    (true, careless), vocabulary = pretrain_flow.number_captions(tokenizer, texts[:50], seed=0)
    own = tokenizer(texts[:50], padding="max_length", max_length=10, return_tensors="pt").input_ids
    assert torch.equal(vocabulary[true], own)
    assert careless.shape == (4, 50) and 0.3 < (careless != true).float().mean() < 1
    empty = tokenizer("", padding="max_length", max_length=10, return_tensors="pt").input_ids
    assert torch.equal(vocabulary[-1:], empty)
