"""One denoising step as a Gaussian: x_t → x_{t-1} ~ Normal(mean, std²), for DDIM with any η.

Pure functions of tensors. ᾱ is the cumulative product of 1 − β, called ``alpha`` for the step's start and
``alpha_next`` for where it leads ("next" in sampling order).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: what a denoiser may predict, in diffusers' words
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class GaussianStep(NamedTuple):
    """The distribution of the next latents, independent per element."""

    mean: Tensor  # (B, C, h, w), float32 (float64 in, float64 out)
    std: Tensor  # broadcastable to mean, >= 0

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, with standard normal ``noise`` of mean's shape."""
        return self.mean + self.std * noise


class Prediction(NamedTuple):
    """A model output as what it says of x_t = √ᾱ x₀ + √(1−ᾱ) ε, each of latents' shape."""

    original: Tensor  # x̂₀, Tweedie's estimate
    epsilon: Tensor  # the noise prediction


def to_prediction(model_output: Tensor, latents: Tensor, alpha: Tensor, prediction_type: str) -> Prediction:
    """Turn a model output of any parametrisation into x̂₀ and ε.

    "v_prediction" and "sample" never divide by √ᾱ, so they hold at zero terminal SNR too (ᾱ = 0 at the first step; Lin
    et al. 2024, "Common diffusion noise schedules and sample steps are flawed").

    Args:
        model_output: what the denoiser returned, (B, C, h, w).
        latents: x_t, (B, C, h, w).
        alpha: ᾱ_t, broadcastable; > 0 for "epsilon".
        prediction_type: "epsilon", "v_prediction" or "sample", as in diffusers' scheduler configuration.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return Prediction(predict_original(model_output, latents, alpha), model_output)
    if prediction_type == "v_prediction":
        original = alpha.sqrt() * latents - (1 - alpha).sqrt() * model_output
        return Prediction(original, alpha.sqrt() * model_output + (1 - alpha).sqrt() * latents)
    if prediction_type == "sample":
        return Prediction(model_output, (latents - alpha.sqrt() * model_output) / (1 - alpha).sqrt())
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")


def to_epsilon(model_output: Tensor, latents: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """The noise prediction ε of a model output; see :func:`to_prediction`."""
    return to_prediction(model_output, latents, alpha, prediction_type).epsilon


def predict_original(noise_pred: Tensor, latents: Tensor, alpha: Tensor) -> Tensor:
    """Tweedie's estimate x̂₀ = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t, DDIM eq. (12)."""
    return (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()


def ddim_std(alpha: Tensor, alpha_next: Tensor, eta: float) -> Tensor:
    """σ_t(η) of DDIM eq. (16): η √((1−ᾱ')/(1−ᾱ)) √(1−ᾱ/ᾱ')."""
    return eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).clamp_min(0).sqrt()


def ddim_step(noise_pred: Tensor, latents: Tensor, alpha: Tensor, alpha_next: Tensor, eta: float) -> GaussianStep:
    """One DDIM step as a Gaussian, DDIM eqs. (12) and (16).

    The mean is affine in ``noise_pred`` with coefficients that depend on t alone; this is why mixing predictions mixes
    drifts (Diffusion Blend eqs. 9 and 10).

    Args:
        noise_pred: ε after guidance, (B, C, h, w).
        latents: x_t, (B, C, h, w).
        alpha, alpha_next: ᾱ_t and ᾱ_{t-1}, broadcastable.
        eta: 0 deterministic … 1 DDPM.
    """
    prediction = Prediction(predict_original(noise_pred, latents, alpha), noise_pred)
    return ddim_gaussian(prediction, alpha, alpha_next, eta)


def ddim_gaussian(prediction: Prediction, alpha: Tensor, alpha_next: Tensor, eta: float) -> GaussianStep:
    """:func:`ddim_step` from x̂₀ and ε: mean √ᾱ' x̂₀ + √(1−ᾱ'−σ²) ε; ``alpha`` may be 0."""
    std = ddim_std(alpha, alpha_next, eta)
    direction = (1 - alpha_next - std.square()).clamp_min(0).sqrt() * prediction.epsilon
    return GaussianStep(alpha_next.sqrt() * prediction.original + direction, std)


def mean_sensitivity(alpha: Tensor, alpha_next: Tensor, eta: float) -> Tensor:
    """|∂mean/∂ε| / σ of a DDIM step.

    Its square over 2 converts the unweighted ‖ε_θ − ε_pre‖² of DPOK's code into the exact Gaussian KL of that step.
    With Stable Diffusion's "leading" spacing the last step but one has several times the others' value, so it
    dominates the variance of a score-function gradient; ``skip_last_steps`` leaves such steps out of training.
    """
    std = ddim_std(alpha, alpha_next, eta)
    coefficient = (1 - alpha_next - std.square()).clamp_min(0).sqrt() - (alpha_next * (1 - alpha) / alpha).sqrt()
    return coefficient.abs() / std


def check_num_inference_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """Refuse a number of denoising steps that no schedule has.

    Raises:
        ValueError: not a whole number from 1 to the training timesteps.
    """
    whole = isinstance(num_inference_steps, int) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be a whole number from 1 to the model's {num_train_timesteps} training "
            f"timesteps, got {num_inference_steps!r}"
        )


def ddim_scheduler(scheduler_config: Mapping[str, Any]) -> Any:
    """diffusers' DDIMScheduler with the noise schedule of any scheduler's configuration.

    It differs from ``DDIMScheduler.from_config`` where the configuration is silent: x̂₀ is not clipped, and the last
    step leads to the first training timestep's ᾱ (PNDM's default), not to 1, so that it has noise to train on.

    Raises:
        ValueError: a configuration without β's (flow matching, EDM), or with another prediction than ε, v or x₀.
    """
    from diffusers import DDIMScheduler

    config = dict(scheduler_config)
    name = config.get("_class_name", "this scheduler")
    flow = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    if flow or not any(config.get(key) is not None for key in ("beta_schedule", "beta_start", "trained_betas")):
        raise ValueError(
            f"{name} has no noise schedule of β's (it is made for flow matching or EDM), and DDIM needs one; use a "
            "base model whose scheduler_config.json names beta_start, beta_end and beta_schedule"
        )
    if name in ("DDIMScheduler", "DDIMParallelScheduler"):  # every value is this scheduler's, also a changed default
        config.pop("_use_default_values", None)
    # what the scheduler itself did where its file said nothing, which from_config would forget
    own = {key: bool(config.get(key, False)) for key in ("clip_sample", "thresholding", "set_alpha_to_one")}
    unsaid = {key for key in config.get("_use_default_values", ()) if key in own}
    config["_use_default_values"] = [key for key in config.get("_use_default_values", ()) if key not in unsaid]
    scheduler = DDIMScheduler.from_config(config | own)
    if scheduler.config["prediction_type"] not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {PREDICTION_TYPES}, got {scheduler.config['prediction_type']!r} in the "
            "scheduler's configuration"
        )
    return scheduler


class DDIMSchedule:
    """The timesteps of one run and ᾱ along them, from a diffusers scheduler's configuration.

    Args:
        scheduler_config: the ``config`` of any diffusers scheduler with β's (Stable Diffusion's, say). Only the noise
            schedule, spacing and prediction type are read; see :func:`ddim_scheduler`.
        num_inference_steps: number T of denoising steps.

    Attributes:
        timesteps: int64 (T,), decreasing.
        alphas, alphas_next: ᾱ at each step's start and end, float64 (T,).

    Raises:
        ValueError: a configuration that clips or thresholds x̂₀ (the step would not be affine in the prediction), one
            without β's, ε-prediction at zero terminal SNR, or a number of steps that the schedule does not have.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], num_inference_steps: int) -> None:
        scheduler = ddim_scheduler(scheduler_config)
        if scheduler.config["clip_sample"] or scheduler.config["thresholding"]:
            raise ValueError(
                "the scheduler clips or thresholds its x0 prediction, so a step is not a Gaussian with an affine mean; "
                "set clip_sample and thresholding to false in scheduler_config.json"
            )
        num_train_timesteps: int = scheduler.config["num_train_timesteps"]
        check_num_inference_steps(num_inference_steps, num_train_timesteps)
        scheduler.set_timesteps(num_inference_steps)
        self.prediction_type: str = scheduler.config["prediction_type"]
        self.timesteps: Tensor = scheduler.timesteps.to(torch.int64)
        if int(self.timesteps.max()) >= num_train_timesteps:
            raise ValueError(
                f"{num_inference_steps} steps with steps_offset {scheduler.config['steps_offset']} begin at timestep "
                f"{int(self.timesteps.max())}, and the last of training is {num_train_timesteps - 1}; take fewer steps"
            )
        next_timesteps = self.timesteps - num_train_timesteps // num_inference_steps
        cumulative = scheduler.alphas_cumprod.double()
        self.alphas = cumulative[self.timesteps]
        if self.prediction_type == "epsilon" and bool((self.alphas == 0).any()):
            raise ValueError(
                "at zero terminal SNR the first step begins at pure noise (ᾱ = 0), of which an epsilon prediction says "
                "nothing; use a v- or sample-predicting model, or set rescale_betas_zero_snr to false in "
                "scheduler_config.json"
            )
        final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64)
        self.alphas_next = torch.where(next_timesteps >= 0, cumulative[next_timesteps.clamp_min(0)], final)

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, step_index: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ and ᾱ' of a step (int) or of each row's step (Tensor (B,)), shaped (·, 1, 1, 1), on ``like``'s device."""
        index = torch.as_tensor(step_index).reshape(-1).cpu()
        shape = (-1, *[1] * (like.ndim - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return (
            self.alphas[index].to(like.device, dtype, non_blocking=True).view(shape),
            self.alphas_next[index].to(like.device, dtype, non_blocking=True).view(shape),
        )

    def step(self, model_output: Tensor, latents: Tensor, step_index: int | Tensor, eta: float) -> GaussianStep:
        """The Gaussian step of ``model_output`` at ``step_index`` (one for all rows, or one per row)."""
        alpha, alpha_next = self.at(step_index, latents)
        prediction = to_prediction(model_output.to(alpha.dtype), latents, alpha, self.prediction_type)
        return ddim_gaussian(prediction, alpha, alpha_next, eta)

    def stds(self, eta: float) -> Tensor:
        """σ_t of every step, float64 (T,)."""
        return ddim_std(self.alphas, self.alphas_next, eta)


def gaussian_log_prob(step: GaussianStep, next_latents: Tensor) -> Tensor:
    """Log density of ``next_latents``, **averaged** over C, h, w: (B,), nats per dimension.

    The average, not the sum, is the convention of DDPO's and DPOK's code; a ratio clip of 1e-4 only makes sense for it.
    """
    std = step.std.expand_as(step.mean)
    z = (next_latents - step.mean) / std
    return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def gaussian_kl(step: GaussianStep, reference: GaussianStep) -> Tensor:
    """KL(step ‖ reference) of two Gaussians of the same std, **summed** over C, h, w: (B,), nats.

    ‖μ − μ_ref‖² / (2σ²): one term of the sum in Diffusion Blend eq. (4).
    """
    return ((step.mean - reference.mean).square() / (2 * step.std.square())).flatten(1).sum(1)
