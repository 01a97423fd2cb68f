"""A DDIM step as a Gaussian, for any η and any prediction type.

Pure functions of tensors. ᾱ is the cumulative product of 1 − β, called ``alpha`` for the step's start and
``alpha_next`` for where it leads ("next" in sampling order).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dblightning.gaussian_step import GaussianStep

#: what a denoiser may predict, in diffusers' words
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


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
    """Tweedie's estimate x̂₀ = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t, DDIM eq. (12).

    >>> import torch
    >>> alpha, original, noise = torch.tensor(0.25), torch.tensor([2.0]), torch.tensor([-1.0])
    >>> predict_original(noise, alpha.sqrt() * original + (1 - alpha).sqrt() * noise, alpha)
    tensor([2.])
    """
    return (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()


def ddim_std(alpha: Tensor, alpha_next: Tensor, eta: float) -> Tensor:
    """σ_t(η) of DDIM eq. (16): η √((1−ᾱ')/(1−ᾱ)) √(1−ᾱ/ᾱ').

    >>> import torch
    >>> [round(ddim_std(torch.tensor(0.5), torch.tensor(0.8), eta).item(), 4) for eta in (0.0, 1.0)]
    [0.0, 0.3873]
    """
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
