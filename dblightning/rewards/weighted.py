"""A weighted sum of rewards is a reward too: what a MORL oracle is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dblightning.rewards.base import RewardMetric


class WeightedReward(RewardMetric):
    """r(w) = Σ wᵢ rᵢ, the linear scalarisation of paper section 3.

    Args:
        rewards: name → reward. The names are those used for adapters and score columns.
        weights: name → weight, the same names; each ≥ 0, sum 1.
        normalize: divide the weights by their sum first.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        ValueError: no reward, names that differ, or weights that are negative, not finite or do not sum to 1.
    """

    def __init__(
        self, rewards: dict[str, RewardMetric], weights: dict[str, float], normalize: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not rewards:
            raise ValueError("WeightedReward needs at least one reward")
        if set(rewards) != set(weights):
            raise ValueError(f"rewards are named {sorted(rewards)} but weights {sorted(weights)}; use the same names")
        if normalize and sum(weights.values()) > 0:
            total = sum(weights.values())
            weights = {name: weight / total for name, weight in weights.items()}
        finite = all(math.isfinite(weight) for weight in weights.values())
        # isclose, not ==: 0.7 + 0.2 + 0.1 is 0.9999999999999999
        if not finite or min(weights.values()) < 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"reward weights must be >= 0 and sum to 1, got {weights}; divide by their sum or pass normalize=True"
            )
        self.rewards = torch.nn.ModuleDict(rewards)
        self.weights = dict(weights)
        bounds = [(self.weights[name], reward.value_range) for name, reward in rewards.items()]
        self.value_range = (_weighted_sum(bounds, 0), _weighted_sum(bounds, 1))

    @property
    def name(self) -> str:
        return "+".join(f"{weight:g}*{name}" for name, weight in self.weights.items())

    @property
    def differentiable(self) -> bool:
        return all(self.rewards[name].differentiable for name in self.rewards)

    @property
    def needs_prompt(self) -> bool:  # type: ignore[override]
        return any(self.rewards[name].needs_prompt for name in self.rewards)

    def score_parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each basis reward by name, every one (B,)."""
        return {name: reward.score(images, prompts) for name, reward in self.rewards.items()}  # type: ignore[operator]

    @property
    def part_names(self) -> list[str]:
        return list(self.weights)

    def score_with_parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        size = self.micro_batch_size or len(prompts)
        starts = range(0, len(prompts), max(size, 1))
        chunks = [self.score_parts(images[at : at + size], prompts[at : at + size]) for at in starts]
        parts = {name: torch.cat([chunk[name] for chunk in chunks]) for name in self.rewards}
        return self.combined(parts), parts

    def combined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of parts' scores, (B,)."""
        return torch.stack([self.weights[name] * parts[name] for name in parts]).sum(0)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.combined(self.score_parts(images, prompts))


def _weighted_sum(bounds: list[tuple[float, tuple[float | None, float | None]]], side: int) -> float | None:
    """Σ weight · bound over rewards that count; None if one of them is unbounded on that side."""
    total = 0.0
    for weight, limits in bounds:
        limit = limits[side]
        if weight > 0 and limit is None:
            return None
        total += weight * (limit or 0.0)
    return total
