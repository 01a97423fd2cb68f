"""One denoising step as a Gaussian: x_t → x_{t-1} ~ Normal(mean, std²), for DDIM with any η.

Pure functions of tensors. ᾱ is the cumulative product of 1 − β, called ``alpha`` for the step's start and
``alpha_next`` for where it leads ("next" in sampling order).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class GaussianStep(NamedTuple):
    """The distribution of the next latents, independent per element."""

    mean: Tensor  # (B, C, h, w), float32 (float64 in, float64 out)
    std: Tensor  # broadcastable to mean, >= 0

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, with standard normal ``noise`` of mean's shape."""
        return self.mean + self.std * noise


def to_epsilon(model_output: Tensor, latents: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """Turn a model output of any parametrisation into the noise prediction ε.

    Args:
        model_output: what the denoiser returned, (B, C, h, w).
        latents: x_t, (B, C, h, w).
        alpha: ᾱ_t, broadcastable.
        prediction_type: "epsilon", "v_prediction" or "sample", as in diffusers' scheduler configuration.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "v_prediction":
        return alpha.sqrt() * model_output + (1 - alpha).sqrt() * latents
    if prediction_type == "sample":
        return (latents - alpha.sqrt() * model_output) / (1 - alpha).sqrt()
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


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
    std = ddim_std(alpha, alpha_next, eta)
    direction = (1 - alpha_next - std.square()).clamp_min(0).sqrt() * noise_pred
    return GaussianStep(alpha_next.sqrt() * predict_original(noise_pred, latents, alpha) + direction, std)


def mean_sensitivity(alpha: Tensor, alpha_next: Tensor, eta: float) -> Tensor:
    """|∂mean/∂ε| / σ of a DDIM step.

    Its square over 2 converts the unweighted ‖ε_θ − ε_pre‖² of DPOK's code into the exact Gaussian KL of that step.
    With Stable Diffusion's "leading" spacing the last step but one has several times the others' value, so it
    dominates the variance of a score-function gradient; ``skip_last_steps`` leaves such steps out of training.
    """
    std = ddim_std(alpha, alpha_next, eta)
    coefficient = (1 - alpha_next - std.square()).clamp_min(0).sqrt() - (alpha_next * (1 - alpha) / alpha).sqrt()
    return coefficient.abs() / std


class DDIMSchedule:
    """The timesteps of one run and ᾱ along them, from a diffusers scheduler's configuration.

    Args:
        scheduler_config: the ``config`` of any diffusers scheduler with β's (Stable Diffusion's, say). Only the noise
            schedule, spacing and prediction type are read.
        num_inference_steps: number T of denoising steps.

    Attributes:
        timesteps: int64 (T,), decreasing.
        alphas, alphas_next: ᾱ at each step's start and end, float64 (T,).

    Raises:
        ValueError: a configuration that clips or thresholds x̂₀ (the step would not be affine in the prediction).
    """

    def __init__(self, scheduler_config: dict[str, Any], num_inference_steps: int) -> None:
        from diffusers import DDIMScheduler

        config = dict(scheduler_config)
        # DDIM's own default is to clip; a scheduler without the key (PNDM, Euler, …) never clips
        config.setdefault("clip_sample", False)
        if config["clip_sample"] or config.get("thresholding", False):
            raise ValueError(
                "the scheduler clips or thresholds its x0 prediction, so a step is no Gaussian with an affine mean; "
                "set clip_sample and thresholding to false in scheduler_config.json"
            )
        config.setdefault("set_alpha_to_one", False)
        scheduler = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(num_inference_steps)
        self.prediction_type: str = scheduler.config["prediction_type"]
        self.timesteps: Tensor = scheduler.timesteps.to(torch.int64)
        next_timesteps = self.timesteps - scheduler.config["num_train_timesteps"] // num_inference_steps
        cumulative = scheduler.alphas_cumprod.double()
        self.alphas = cumulative[self.timesteps]
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
        epsilon = to_epsilon(model_output.to(alpha.dtype), latents, alpha, self.prediction_type)
        return ddim_step(epsilon, latents, alpha, alpha_next, eta)

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
