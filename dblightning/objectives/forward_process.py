"""Forward-process objectives: a denoising loss on final samples, weighted by their advantage. NFT and AWM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dblightning.objectives.base import Metrics, Needs, Objective, Policy
from dblightning.objectives.policy_gradient import clip_fraction, ppo_objective
from dblightning.replay import Transitions
from dblightning.solvers import GaussianSolver
from dblightning.training_rules import forward_problems
from dblightning.training_settings import TrainingSettings

#: least mean distance to divide by
LEAST_DISTANCE = 1e-5


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """r = clip(A, ±c) / (2c) + ½ in [0, 1], (B,): the share of a sample that counts as good.

    >>> optimality(torch.tensor([-9.0, 0.0, 2.5]), clip=5.0)
    tensor([0.0000, 0.5000, 0.7500])
    """
    return advantage.clamp(-clip, clip) / (2 * clip) + 0.5


def nft_loss(
    current: Tensor, old: Tensor, original: Tensor, optimal: Tensor, beta: float, adaptive: bool = True
) -> Tensor:
    """DiffusionNFT's loss, (r ℓ⁺ + (1 − r) ℓ⁻) / β per sample, (B,).

    ℓ^± = mean((x̂₀^± − x₀)²) / W^±, of x̂₀⁺ = β x̂₀^θ + (1−β) x̂₀^old and x̂₀⁻ = (1+β) x̂₀^old − β x̂₀^θ. x̂₀ is affine in
    the model's output and the coefficients sum to 1, so mixing outputs (as the source does) or x̂₀ is the same, for a
    model of any parametrisation.

    Args:
        current: x̂₀ of the policy, (B, C, h, w).
        old: x̂₀ of the policy that sampled, no gradient.
        original: the sample x₀.
        optimal: r of :func:`optimality`, (B,).
        beta: β > 0, strength of the guidance that the policy learns.
        adaptive: W^± = mean|x̂₀^± − x₀|, without gradient (source); else 1.
    """
    total = torch.zeros_like(optimal)
    for share, mixed in (
        (optimal, beta * current + (1 - beta) * old),
        (1 - optimal, (1 + beta) * old - beta * current),
    ):
        error = (mixed - original).flatten(1)
        weight = error.detach().abs().mean(1).clamp_min(LEAST_DISTANCE) if adaptive else 1.0
        total = total + share * error.square().mean(1) / weight
    return total / beta


def original_gain(solver: GaussianSolver, step_index: Tensor, like: Tensor) -> Tensor:
    """|∂x̂₀/∂output| of each step, (B,): x̂₀ is affine in the model's output, with a coefficient of the step's alone."""
    zero = torch.zeros(len(step_index), *[1] * (like.ndim - 1), device=like.device, dtype=like.dtype)
    return (solver.original(zero + 1, zero, step_index) - solver.original(zero, zero, step_index)).abs().flatten()


def output_error(solver: GaussianSolver, output: Tensor, transitions: Transitions) -> Tensor:
    """mean((output − target)²) of noised samples, (B,): the target is the output that recovers the sample.

    The error of x̂₀ divided by :func:`original_gain`, for x̂₀ is affine in the output: of any parametrisation.
    """
    latents, at = transitions.latents, transitions.step_index
    distance = solver.original(output, latents, at) - transitions.next_latents
    return distance.flatten(1).square().mean(1) / original_gain(solver, at, latents).square()


class ForwardProcess(Objective):
    """Base class of objectives on noised final samples."""

    needs: ClassVar[Needs] = "samples"

    def check(self, settings: TrainingSettings) -> None:
        for problem in forward_problems(type(self).__name__, dict(settings.groups()), self.keeps_old):
            raise ValueError(problem)


@dataclass(kw_only=True)
class OldPolicyProcess(ForwardProcess):
    """Base class of those whose samples are of an old policy that follows the trained one."""

    keeps_old: ClassVar[bool] = True
    decay_start: int = 0
    decay_rate: float = 0.0
    decay_max: float = 0.5

    def old_decay(self, rollouts: int) -> float:
        """η = min(rate · (rollouts − start), max), 0 before the start: θ_old ← η θ_old + (1 − η) θ."""
        return min(max(self.decay_rate * (rollouts - self.decay_start), 0.0), self.decay_max)


@dataclass
class NFT(OldPolicyProcess):
    """DiffusionNFT (Zheng et al. 2025, 2509.16117): contrast of a good and a bad policy on noised samples.

    Rollouts are sampled by an old policy, a second adapter that follows the trained one. Its log-probs are not used.
    At u = x̂₀^θ − x̂₀^old = 0 the loss's gradient is that of −2 · E[A (x₀ − x̂₀^old) · u], without weights W: each
    prediction moves towards the samples of positive advantage.

    Args:
        beta: β > 0 (source: 1, or 0.1 for a stronger reward).
        noise_draws: noise levels and noises per sample and pass; a sample's levels differ as long as there are enough.
        advantage_clip: c, advantage of a sample that is wholly good.
        adaptive: divide each error by its own mean distance, see :func:`nft_loss`.
        decay_start, decay_rate, decay_max: of the old policy by rollouts, η = min(rate · (rollouts − start), max), 0
            before the start. (Source: 0, 0.001, 0.5; or 75, 0.0075, 0.999; a rate of 0 is on-policy.)
    """

    beta: float = 1.0
    noise_draws: int = 4
    advantage_clip: float = 5.0
    adaptive: bool = True
    decay_rate: float = 0.001

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """:func:`nft_loss` times ``advantage_clip``, averaged over the noised samples."""
        solver, latents, at = policy.solver, transitions.latents, transitions.step_index
        current, old = (
            solver.original(each, latents, at) for each in (policy.current(transitions), policy.old(transitions))
        )
        optimal = optimality(transitions.advantage, self.advantage_clip)
        loss = nft_loss(current, old, transitions.next_latents, optimal, self.beta, self.adaptive)
        return self.advantage_clip * loss.mean(), {
            "train/optimality": optimal.mean(),
            "train/old_distance": (current - old).square().mean(),
            "train/denoising_error": (current - transitions.next_latents).square().mean(),
        }


@dataclass
class AWM(OldPolicyProcess):
    """Advantage-weighted matching (2509.25050): PPO whose log-prob is minus the denoising loss of the sample.

    ρ = exp(ℓ_old − ℓ_θ) with ℓ = mean((output − target)²); the target is the output that is right for this sample and
    noise: ε, or the velocity ε − x₀.

    Args:
        clip_range: c of the ratio clip (source: 1e-5).
        noise_draws: noise levels and noises per sample and pass.
        decay_start, decay_rate, decay_max: see :class:`NFT`.
    """

    clip_range: float = 1e-5
    noise_draws: int = 4

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        current, old = (
            output_error(policy.solver, output, transitions)
            for output in (policy.current(transitions), policy.old(transitions))
        )
        ratio = (old - current).exp()
        return -ppo_objective(transitions.advantage, ratio, self.clip_range).mean(), {
            "train/ratio": ratio.mean(),
            "train/clip_fraction": clip_fraction(ratio, self.clip_range),
            "train/denoising_error": current.mean(),
        }
