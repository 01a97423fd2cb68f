from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn

from dblightning.miniature import pretrain, world

TINY = ["--images", "24", "--vae-batch", "4", "--unet-batch", "4", "--vae-steps", "2", "--snapshot-minutes", "1000"]
TINY += ["--clean-steps", "1"]


def test_a_tiny_budget_runs_from_drawing_to_a_pipeline_folder_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "pipeline"
    pretrain.main([*TINY, "--out", str(out), "--unet-steps", "2", "--no-bf16"])
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.safety_checker is None
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    config = pipeline.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.set_alpha_to_one, config.steps_offset, config.clip_sample) == (False, 1, False)
    assert pipeline.vae.config.scaling_factor != 0.18215  # its own latents', not SD's
    with torch.no_grad():
        images = pipeline(
            ["A red colored circle."], num_inference_steps=2, height=32, width=32, output_type="np"
        ).images
    assert images.shape == (1, 32, 32, 3)

    with pytest.raises(SystemExit):  # an earlier run is not overwritten
        pretrain.main([*TINY, "--out", str(out), "--unet-steps", "2"])
    with pytest.raises(ValueError, match="of a run of 2 steps, not 3"):
        pretrain.main([*TINY, "--out", str(out), "--unet-steps", "3", "--resume", "--no-bf16"])


def test_stopping_and_resuming_gives_the_weights_of_not_stopping(tmp_path: Path) -> None:
    target = torch.linspace(-1, 1, 8)

    def run(state: Path, stop_at: int | None) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(8))
        calls = 0

        def loss(generator: torch.Generator, step: int) -> torch.Tensor:
            nonlocal calls
            if calls == stop_at:
                raise KeyboardInterrupt
            calls += 1
            return (parameter - target - torch.randn(8, generator=generator)).square().mean()

        pretrain.train("toy", [parameter], loss, 6, 0.1, 0.9, state, seed=1, save_minutes=0.0)
        return parameter

    whole = run(tmp_path / "whole.pt", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves.pt", 3)
    halves = run(tmp_path / "halves.pt", None)
    assert torch.equal(whole, halves)
    assert whole.abs().sum() > 0


def test_the_average_swaps_in_and_out_and_follows_its_recursion() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = pretrain.Average([parameter], decay=0.999)
    with torch.no_grad():
        parameter.fill_(3.0)
    average.update()
    average.swap()
    # first decay (1 + 1) / (10 + 1): 1 · 2/11 + 3 · 9/11
    torch.testing.assert_close(parameter.detach(), torch.tensor([29 / 11]))
    average.swap()
    assert parameter.item() == 3.0


def test_the_tokenizer_keeps_every_word_of_the_world_apart_and_every_caption_whole() -> None:
    tokenizer = pretrain.build_tokenizer()
    words = [*world.COLORS, *world.SHAPES]
    ids = [tokenizer(word).input_ids for word in words]
    assert len({tuple(each) for each in ids}) == len(words)
    for prompt in world.train_prompts() + world.test_prompts():
        tokens = tokenizer(prompt).input_ids
        assert len(tokens) <= pretrain.MAX_LENGTH
        assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == prompt.lower().replace(" ", "")


def test_nonsense_budgets_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--out", str(tmp_path / "x"), "--unet-steps", "0"])
    assert "--unet-steps: must be an integer of at least 1" in capsys.readouterr().err
