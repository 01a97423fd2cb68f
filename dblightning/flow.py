"""A flow-matching step as a Gaussian: Flow-SDE, Dance-SDE, CPS and the ODE, for a velocity prediction.

Pure functions of tensors. On the path x_σ = (1−σ) x₀ + σ ε the network predicts v = ε − x₀, and sampling runs from
σ = 1 to σ = 0; ``sigma`` is the step's start and ``next_sigma`` where it leads ("next" in sampling order).

Every step here is x' = (1−σ') x̂₀ + c ε̂ + s z with z standard normal, affine in v with coefficients of the step alone.
So for weights of sum one, mixing velocities, x̂₀, ε̂ or scores is the same, and mixes the steps' means:

>>> import torch
>>> x, sigma, w = torch.tensor([0.5]).double(), torch.tensor(0.8).double(), torch.tensor([[0.3], [0.7]]).double()
>>> v = torch.tensor([[1.0], [-2.0]]).double()
>>> torch.allclose(flow_score((w * v).sum(0), x, sigma), (w * flow_score(v, x, sigma)).sum(0), rtol=0, atol=1e-12)
True

For weights of sum S ≠ 1 they differ: Σ w · score = −(S x + (1−σ) Σ w v) / σ.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dblightning.ddim import Prediction
from dblightning.gaussian_step import GaussianStep

#: how a flow's step draws noise: Flow-GRPO's and DanceGRPO's SDE, or coefficients-preserving sampling
FlowNoise = Literal["flow_sde", "dance_sde", "cps"]


class StepCoefficients(NamedTuple):
    """A step x' = (1−σ') x̂₀ + c ε̂ + s z; each broadcastable to the latents."""

    direction: Tensor  # c
    std: Tensor  # s, >= 0


def velocity_prediction(velocity: Tensor, latents: Tensor, sigma: Tensor) -> Prediction:
    """x̂₀ = x − σ v and ε̂ = x + (1−σ) v.

    Args:
        velocity: v after guidance, (B, C, h, w).
        latents: x_σ, (B, C, h, w).
        sigma: σ in [0, 1], broadcastable.
    """
    return Prediction(latents - sigma * velocity, latents + (1 - sigma) * velocity)


def flow_score(velocity: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """∇ log p_σ(x) = −ε̂ / σ, for σ > 0; arguments as in :func:`velocity_prediction`."""
    return -velocity_prediction(velocity, latents, sigma).epsilon / sigma


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def flow_sde_diffusion(sigma: Tensor, eta: float, below_one: Tensor) -> Tensor:
    """g of Flow-SDE, η √(σ / (1−σ)) (Liu et al. 2025, Flow-GRPO).

    Args:
        sigma: σ in (0, 1].
        eta: η ≥ 0.
        below_one: what stands for σ in the denominator where σ = 1: the schedule's second value.

    >>> flow_sde_diffusion(torch.tensor([1.0, 0.5]), 2.0, torch.tensor(0.75))
    tensor([4., 2.])
    """
    return eta * (sigma / (1 - torch.where(sigma < 1, sigma, below_one))).sqrt()


def sde_coefficients(sigma: Tensor, next_sigma: Tensor, diffusion: Tensor) -> StepCoefficients:
    """An Euler–Maruyama step of diffusion g: mean x + d (v + g²/(2σ) ε̂) with d = σ' − σ, std g √(−d).

    Written on x̂₀ and ε̂, the mean is (1−σ') x̂₀ + (σ' + d g²/(2σ)) ε̂. Dance-SDE is g = η (Xue et al. 2025), the ODE
    g = 0.

    Args:
        sigma, next_sigma: 1 ≥ σ > σ' ≥ 0.
        diffusion: g ≥ 0.
    """
    step = next_sigma - sigma
    return StepCoefficients(next_sigma + step * diffusion.square() / (2 * sigma), diffusion * (-step).sqrt())


def cps_coefficients(next_sigma: Tensor, eta: float) -> StepCoefficients:
    """Coefficients-preserving sampling: c = σ' cos(ηπ/2) and s = σ' sin(ηπ/2) (2509.05952).

    c² + s² = σ'², so with a perfect network x' has the marginal's noise exactly, whatever η; an Euler–Maruyama step
    leaves more. η = 0 is the ODE's step, η = 1 draws all of the noise anew.

    Args:
        next_sigma: σ' in [0, 1).
        eta: η in [0, 1].
    """
    angle = eta * math.pi / 2
    # the cosine of a floating-point π/2 is 6e-17
    return StepCoefficients(next_sigma * (0.0 if eta == 1 else math.cos(angle)), next_sigma * math.sin(angle))


def flow_gaussian(
    velocity: Tensor, latents: Tensor, sigma: Tensor, next_sigma: Tensor, coefficients: StepCoefficients
) -> GaussianStep:
    """The step as a Gaussian; with the ODE's coefficients (c = σ', s = 0) its mean is x + (σ' − σ) v.

    Args:
        velocity: v after guidance, (B, C, h, w).
        latents: x_σ, (B, C, h, w).
        sigma, next_sigma: broadcastable.
        coefficients: c and s of the step.
    """
    # collected by x and v: x̂₀ and ε̂ apart would round twice
    of_latents = 1 - next_sigma + coefficients.direction
    of_velocity = velocity_coefficient(sigma, next_sigma, coefficients)
    mean = of_latents.to(latents.dtype) * latents + of_velocity.to(latents.dtype) * velocity
    return GaussianStep(mean, coefficients.std.to(latents.dtype))


def velocity_coefficient(sigma: Tensor, next_sigma: Tensor, coefficients: StepCoefficients) -> Tensor:
    """∂mean/∂v = c (1−σ) − σ (1−σ'); negative."""
    return coefficients.direction * (1 - sigma) - sigma * (1 - next_sigma)


def velocity_sensitivity(sigma: Tensor, next_sigma: Tensor, coefficients: StepCoefficients) -> Tensor:
    """|∂mean/∂v| / s: half its square times ‖v_θ − v_pre‖² is the step's exact KL, see ``gaussian_step.gaussian_kl``.

    Flow-SDE's is √|d| (1 + η²/2) √((1−σ)/σ) / η for σ < 1; infinite for a step without noise.
    """
    return velocity_coefficient(sigma, next_sigma, coefficients).abs() / coefficients.std


# ── shift ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Static shift σ ← s σ / (1 + (s−1) σ); Stable Diffusion 3 has s = 3.

    >>> shifted(torch.tensor([1.0, 0.5, 0.0]), 3.0)
    tensor([1.0000, 0.7500, 0.0000])
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_mu(
    tokens: int, base_tokens: int = 256, most_tokens: int = 4096, base_shift: float = 0.5, most_shift: float = 1.15
) -> float:
    """μ of the dynamic shift, linear in an image's number of tokens; the shift is then e^μ (FLUX).

    Args:
        tokens: number of image tokens L that the transformer sees.
        base_tokens, most_tokens: where μ is ``base_shift`` and ``most_shift``.

    >>> dynamic_mu(256), dynamic_mu(4096)
    (0.5, 1.15)
    """
    slope = (most_shift - base_shift) / (most_tokens - base_tokens)
    return slope * tokens + (base_shift - slope * base_tokens)


def dynamically_shifted(sigma: Tensor, mu: float) -> Tensor:
    """e^μ / (e^μ + 1/σ − 1): :func:`shifted` by e^μ."""
    return shifted(sigma, math.exp(mu))
