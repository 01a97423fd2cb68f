from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch.distributions import Independent, Normal, kl_divergence

from dblightning.schedule import (
    DDIMSchedule,
    GaussianStep,
    ddim_scheduler,
    gaussian_kl,
    gaussian_log_prob,
    mean_sensitivity,
    predict_original,
    to_prediction,
)

SD15: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
#: ᾱ = 0 at the last training timestep, which "trailing" spacing begins with
ZERO_SNR = SD15 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


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


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_zero_terminal_snr_is_finite_and_diffusers_ddim(prediction_type: str, eta: float) -> None:
    """The first step begins at ᾱ = 0; a trajectory of ours against one of theirs."""
    theirs = DDIMScheduler(**ZERO_SNR, prediction_type=prediction_type)
    theirs.set_timesteps(10)
    ours = DDIMSchedule(theirs.config, 10)
    assert float(ours.alphas[0]) == 0
    generator = torch.Generator().manual_seed(0)
    latents = expected = torch.randn(2, 4, 8, 8, generator=generator)
    for step_index, timestep in enumerate(theirs.timesteps):
        output, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
        latents = ours.step(output, latents, step_index, eta).sample(noise)
        expected = theirs.step(
            output, int(timestep), expected, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
        # 1e-5: ten steps of float32 rounding on values of order 1
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 0.999])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_both_parts_of_a_prediction_are_recovered_from_its_definition(prediction_type: str, alpha: float) -> None:
    """x = √ᾱ x₀ + √(1−ᾱ) ε and v = √ᾱ ε − √(1−ᾱ) x₀ (Salimans and Ho 2022), at any ᾱ from 0 on."""
    original, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    output = a * noise - b * original if prediction_type == "v_prediction" else original
    latents = a * original + b * noise
    prediction = to_prediction(output, latents, torch.tensor(alpha, dtype=torch.float64), prediction_type)
    torch.testing.assert_close(prediction.original, original)
    torch.testing.assert_close(prediction.epsilon, noise)


def test_an_epsilon_prediction_at_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(ValueError, match="pure noise .* use a v- or sample-predicting model"):
        DDIMSchedule(ZERO_SNR, 10)
    DDIMSchedule(ZERO_SNR | {"timestep_spacing": "leading"}, 10)  # never visits ᾱ = 0


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, 1001, "ten"])
def test_a_number_of_steps_that_no_schedule_has_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=rf"a whole number from 1 to the model's 1000 .* got {steps!r}"):
        DDIMSchedule(SD15, steps)


def test_more_steps_than_the_offset_leaves_are_refused() -> None:
    """Leading spacing and offset 1: diffusers' first timestep of 1000 steps would be 1000, past the last, 999."""
    with pytest.raises(ValueError, match="begin at timestep 1000"):
        DDIMSchedule(SD15, 1000)
    assert len(DDIMSchedule(SD15 | {"steps_offset": 0}, 1000)) == 1000


@pytest.mark.parametrize(
    "config",
    [
        dict(FlowMatchEulerDiscreteScheduler().config),
        dict(EDMEulerScheduler().config),
        dict(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config),
        {"num_train_timesteps": 1000},
    ],
    ids=["flow matching", "EDM", "flow sigmas", "nothing"],
)
def test_a_configuration_without_a_noise_schedule_of_betas_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no noise schedule of β's"):
        DDIMSchedule(config, 10)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_the_last_step_of_a_base_that_is_silent_about_it_has_noise(kind: Any) -> None:
    """ᾱ of the first training timestep, 1 − β₁ = 0.99915, in the schedule and in the scheduler the pipeline takes."""
    config = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config
    scheduler = ddim_scheduler(config)
    assert float(DDIMSchedule(config, 10).alphas_next[-1]) == pytest.approx(1 - 0.00085, abs=1e-7)
    assert float(scheduler.final_alpha_cumprod) == pytest.approx(1 - 0.00085, abs=1e-7)
    assert torch.equal(DDIMSchedule(scheduler.config, 10).alphas_next, DDIMSchedule(config, 10).alphas_next)


@pytest.mark.parametrize("said", [True, False])
def test_a_base_that_says_where_its_last_step_leads_is_taken_at_its_word(said: bool) -> None:
    scheduler = DDIMScheduler(**SD15 | {"set_alpha_to_one": said})
    last = float(DDIMSchedule(scheduler.config, 10).alphas_next[-1])
    assert last == pytest.approx(1.0 if said else 1 - 0.00085, abs=1e-7)
    silent = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    assert float(DDIMSchedule(silent.config, 10).alphas_next[-1]) == 1.0  # DDIM's own default


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
