"""One denoising step as a Gaussian, x_t → x_{t-1} ~ Normal(mean, std²), whatever the solver. Pure functions."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class GaussianStep(NamedTuple):
    """The distribution of the next latents, independent per element."""

    mean: Tensor  # (B, C, h, w), float32 (float64 in, float64 out)
    std: Tensor  # broadcastable to mean, >= 0

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, with standard normal ``noise`` of mean's shape."""
        return self.mean + self.std * noise


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

    >>> import torch
    >>> mean, std = torch.ones(1, 2), torch.tensor(0.5)
    >>> gaussian_kl(GaussianStep(mean, std), GaussianStep(0 * mean, std))  # two dimensions of 1 / (2 · 0.25)
    tensor([4.])
    """
    return ((step.mean - reference.mean).square() / (2 * step.std.square())).flatten(1).sum(1)
