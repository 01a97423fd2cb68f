from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal, kl_divergence

from dblightning.schedule import (
    DDIMSchedule,
    GaussianStep,
    gaussian_kl,
    gaussian_log_prob,
    mean_sensitivity,
    predict_original,
)

SD15: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("num_steps", [1, 20, 50])
def test_a_step_equals_diffusers_ddim_with_the_same_noise(prediction_type: str, eta: float, num_steps: int) -> None:
    theirs = DDIMScheduler(**SD15, prediction_type=prediction_type)
    theirs.set_timesteps(num_steps)
    ours = DDIMSchedule(theirs.config, num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for step_index, timestep in enumerate(theirs.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        expected = theirs.step(output, int(timestep), latents, eta=eta, variance_noise=noise if eta else None)
        step = ours.step(output, latents, step_index, eta)
        # 1e-5 of the largest value: float32 rounding, and the last step but one divides by a small √(1−ᾱ)
        torch.testing.assert_close(step.sample(noise), expected.prev_sample, rtol=1e-5, atol=1e-5)


def test_each_row_may_stand_at_its_own_step() -> None:
    schedule = DDIMSchedule(SD15, 10)
    latents, output = torch.randn(2, 3, 4, 8, 8)
    together = schedule.step(output, latents, torch.tensor([7, 0, 3]), 1.0)
    for row, step_index in enumerate([7, 0, 3]):
        alone = schedule.step(output[row : row + 1], latents[row : row + 1], step_index, 1.0)
        assert torch.equal(together.mean[row : row + 1], alone.mean)
        assert torch.equal(together.std[row : row + 1], alone.std)


def test_log_prob_is_the_mean_over_dimensions_of_torch_distributions() -> None:
    mean, x = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    std = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    expected = Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(GaussianStep(mean, std), x), expected)


def test_kl_is_torch_distributions_kl_in_nats() -> None:
    mean, reference = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    std = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    p, q = (Independent(Normal(each, std.expand_as(each)), 3) for each in (mean, reference))
    kl = gaussian_kl(GaussianStep(mean, std), GaussianStep(reference, std))
    torch.testing.assert_close(kl, kl_divergence(p, q))


@pytest.mark.parametrize("num_steps", [20, 50])
def test_sensitivity_squared_over_two_turns_the_epsilon_error_into_the_kl(num_steps: int) -> None:
    schedule = DDIMSchedule(SD15, num_steps)
    latents, output, other = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    for step_index in range(num_steps):
        step, reference = (schedule.step(each, latents, step_index, 1.0) for each in (output, other))
        alpha, after = schedule.alphas[step_index], schedule.alphas_next[step_index]
        weight = mean_sensitivity(alpha, after, 1.0) ** 2 / 2
        expected = weight * (output - other).square().flatten(1).sum(1)
        torch.testing.assert_close(gaussian_kl(step, reference), expected)


def test_the_published_sensitivity_of_stable_diffusion_is_reproduced() -> None:
    """50 steps: 5.4 = c²/(2σ²) at t = 21 and 0.5 at t = 41 and t = 1, found independently in the paper's setting."""
    schedule = DDIMSchedule(SD15, 50)
    weight = mean_sensitivity(schedule.alphas, schedule.alphas_next, 1.0) ** 2 / 2
    at = dict(zip(schedule.timesteps.tolist(), weight.tolist(), strict=True))
    # the figures are stated to two digits
    assert at[21] == pytest.approx(5.4, abs=0.05)
    assert at[41] == pytest.approx(0.52, abs=0.01)
    assert at[1] == pytest.approx(0.50, abs=0.01)


def test_the_original_is_recovered_from_its_noise() -> None:
    original, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    latents = math.sqrt(0.3) * original + math.sqrt(0.7) * noise
    torch.testing.assert_close(predict_original(noise, latents, alpha), original)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="clips or thresholds"):
        DDIMSchedule(SD15 | {key: True}, 10)
