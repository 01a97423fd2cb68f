"""Policy-gradient objectives that compare with the mean of the policy that sampled: GRPO-Guard and Flow-DPPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dblightning.objectives.base import Metrics, Objective, Policy
from dblightning.objectives.policy_gradient import GRPO, clip_fraction, ratio_metrics
from dblightning.replay import Transitions
from dblightning.schedule import GaussianStep, gaussian_log_prob
from dblightning.solvers import GaussianSolver


def guarded_ratio(step: GaussianStep, old_mean: Tensor, next_latents: Tensor) -> Tensor:
    """GRPO-Guard's ratio exp(mean(z · Δμ)), (B,), z the noise that was drawn and Δμ = μ_θ − μ_old.

    The source (2510.22319) writes exp((log p_θ − log p_old + b) σ) with b = mean(Δμ²) / (2σ²), log-probs averaged over
    dimensions. With x' = μ_old + σ z that is the same number: the log-ratio is mean(z Δμ) / σ − b. So the guard takes
    out the bias b, which pushes every ratio below 1, and the factor 1/σ, which makes late steps' ratios wide.

    Args:
        step: of the current policy.
        old_mean: μ_old, (B, C, h, w).
        next_latents: what was sampled, (B, C, h, w).
    """
    z = (next_latents - old_mean) / step.std
    return (z * (step.mean - old_mean)).flatten(1).mean(1).exp()


def step_divergence(step: GaussianStep, old_mean: Tensor) -> Tensor:
    """KL of a step's Gaussians under the current policy and the one that sampled, averaged over dimensions, (B,)."""
    return ((step.mean - old_mean).square() / (2 * step.std.square())).flatten(1).mean(1)


def divergence_mask(advantage: Tensor, ratio: Tensor, divergence: Tensor, max_divergence: float) -> Tensor:
    """Flow-DPPO's mask, float (B,): 0 where a step diverged by ``max_divergence`` and would go on to diverge.

    A step goes on to diverge where its advantage and its ratio point the same way: A > 0 and ρ > 1, or A < 0 and ρ < 1.

    >>> one, far = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.1])
    >>> divergence_mask(torch.tensor([2.0, 2.0, -2.0, 2.0]), torch.tensor([1.5, 0.5, 0.5, 1.5]), far, 0.5)
    tensor([0., 1., 0., 1.])
    """
    away = advantage * (ratio - 1) > 0
    return (~(away & (divergence >= max_divergence))).to(ratio)


def output_gain(solver: GaussianSolver, step_index: Tensor, like: Tensor) -> Tensor:
    """|∂μ/∂output| of each step, (B,): μ is affine in the model's output, with a coefficient of the step's alone.

    On Flow-SDE it is |Δt| (1 + η²/2) where σ < 1.
    """
    zero = torch.zeros(len(step_index), *[1] * (like.ndim - 1), device=like.device, dtype=like.dtype)
    means = [solver.gaussian(output, zero, step_index).mean for output in (zero + 1, zero)]
    return (means[0] - means[1]).abs().flatten()


@dataclass
class GRPOGuard(GRPO):
    """GRPO with a ratio whose spread is the same at every step (Wang et al. 2025, 2510.22319).

    Ratio of :func:`guarded_ratio`, and each step's loss divided by :func:`output_gain`, so that the gradient of the
    model's output has the same size at every step. (The source divides by the flow step |Δt|, which on Flow-SDE differs
    by the constant 1 + η²/2.) Beside the KL, a step's weight is σ / output gain times GRPO's: the optimum is eq. (4)'s
    with an α per step.

    Args:
        clip_range: c of the ratio clip [1−c, 1+c] (source: 2e-6).
    """

    clip_range: float = 2e-6

    stores: ClassVar[tuple[Literal["mean"], ...]] = ("mean",)

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        step = policy.step(transitions)
        ratio = guarded_ratio(step, transitions.mean, transitions.next_latents)
        gain = output_gain(policy.solver, transitions.step_index, transitions.latents)
        loss = -(self.surrogate(transitions.advantage, ratio) / gain).mean()
        return loss, ratio_metrics(ratio, transitions) | {"train/clip_fraction": clip_fraction(ratio, self.clip_range)}


@dataclass
class FlowDPPO(Objective):
    """A policy gradient without clip, masked by a step's exact divergence (Flow-DPPO, 2606.11025).

    Unlike DPOK's clamp it keeps the gradient that brings a step back, and unlike PPO's it asks how far the step's
    distribution has moved, not how far its one sample's ratio has.

    Args:
        max_divergence: δ, of the KL of a step averaged over dimensions (source: 1e-5).
    """

    max_divergence: float = 1e-5

    stores: ClassVar[tuple[Literal["mean"], ...]] = ("mean",)

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """−mask · advantage · ratio, averaged over the transitions."""
        step, advantage = policy.step(transitions), transitions.advantage
        ratio = (gaussian_log_prob(step, transitions.next_latents) - transitions.log_prob).exp()
        divergence = step_divergence(step, transitions.mean).detach()
        mask = divergence_mask(advantage, ratio.detach(), divergence, self.max_divergence)
        return -(mask * advantage * ratio).mean(), ratio_metrics(ratio, transitions) | {
            "train/masked_fraction": 1 - mask.mean(),
            "train/divergence": divergence.mean(),
        }
