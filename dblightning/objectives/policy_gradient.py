"""Policy-gradient objectives, DPOK, PPO, GRPO: the surrogates as pure functions, and as what training takes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dblightning.objectives.base import Metrics, Objective, Policy
from dblightning.replay import Transitions
from dblightning.schedule import gaussian_log_prob
from dblightning.training_rules import group_problem
from dblightning.training_settings import TrainingSettings


def dpok_objective(advantage: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """DPOK's surrogate, advantage · clamp(ratio, 1−c, 1+c), per sample (B,); to be maximised.

    The clamp is hard: outside the range a sample has no gradient in either direction (Fan et al. 2023, and the code
    of Diffusion Blend).

    Args:
        advantage: (B,), no gradient.
        ratio: p_θ(x_{t-1}|x_t) / p_old(x_{t-1}|x_t), (B,).
        clip_range: c > 0; the paper's 1e-4 is made for log-probs averaged over dimensions.

    >>> dpok_objective(torch.tensor([2.0, -2.0]), torch.tensor([0.5, 0.5]), clip_range=0.25)
    tensor([ 1.5000, -1.5000])
    """
    return advantage * ratio.clamp(1 - clip_range, 1 + clip_range)


def ppo_objective(advantage: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic surrogate, min(A·ratio, A·clamp(ratio)), per sample (B,); to be maximised.

    Unlike :func:`dpok_objective` it keeps the gradient that brings a ratio back (Schulman et al. 2017, eq. 7).

    >>> ppo_objective(torch.tensor([2.0, -2.0]), torch.tensor([0.5, 0.5]), clip_range=0.25)
    tensor([ 1.0000, -1.5000])
    """
    return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Share of ratios outside [1−c, 1+c]: scalar in [0, 1]."""
    return ((ratio - 1).abs() > clip_range).float().mean()


def ratio_metrics(ratio: Tensor, transitions: Transitions) -> Metrics:
    """What every objective with a ratio logs about it: its mean, and its error where it has to be 1."""
    return {
        "train/ratio": ratio.mean(),
        # of the latest rollout's: until the first step of an update their policy is the one that sampled
        "train/on_policy_ratio_error": torch.where(transitions.age == 0, (ratio - 1).abs(), 0).max(),
    }


@dataclass
class PolicyGradient(Objective):
    """Base class of objectives that weigh a step's likelihood ratio with its advantage.

    Args:
        clip_range: c of the ratio clip [1−c, 1+c] (paper: 1e-4).
    """

    clip_range: float = 1e-4

    @abstractmethod
    def surrogate(self, advantage: Tensor, ratio: Tensor) -> Tensor:
        """What is maximised, per transition: all (B,)."""

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """−surrogate, averaged over the transitions."""
        log_prob = gaussian_log_prob(policy.step(transitions), transitions.next_latents)
        ratio = (log_prob - transitions.log_prob).exp()
        loss = -self.surrogate(transitions.advantage, ratio).mean()
        return loss, ratio_metrics(ratio, transitions) | {"train/clip_fraction": clip_fraction(ratio, self.clip_range)}


class DPOK(PolicyGradient):
    """DPOK: the ratio is clamped hard, see :func:`dpok_objective`."""

    def surrogate(self, advantage: Tensor, ratio: Tensor) -> Tensor:
        return dpok_objective(advantage, ratio, self.clip_range)


class PPO(PolicyGradient):
    """PPO: the smaller of the clipped and the unclipped surrogate, see :func:`ppo_objective`."""

    def surrogate(self, advantage: Tensor, ratio: Tensor) -> Tensor:
        return ppo_objective(advantage, ratio, self.clip_range)


class GRPO(PPO):
    """GRPO: PPO's surrogate on advantages within a prompt's group (Shao et al. 2024; Flow-GRPO, Liu et al. 2025).

    What makes it GRPO stands in ``advantage``: ``baseline: group``, which it insists on, and by custom ``normalize``,
    ``deviation``, ``clip: 5`` and ``drop_flat_groups``; passes through a rollout are ``optimisation.epochs``.
    """

    def check(self, settings: TrainingSettings) -> None:
        for problem in group_problem(type(self).__name__, dict(settings.groups())):
            raise ValueError(problem)
