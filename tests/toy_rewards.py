"""Rewards in closed form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dblightning.rewards.base import RewardMetric


class AnyTensorReward(RewardMetric):
    """Base class for rewards of a "picture" that is any tensor: the checks of pictures are left out."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(images, list(prompts))


class SlopedReward(RewardMetric):
    """Base class for multiples of something linear in the picture."""

    is_differentiable = True

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope


class Brightness(SlopedReward):
    """Mean of the picture, times the slope."""

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.slope * images.flatten(1).mean(1)


class LinearReward(SlopedReward, AnyTensorReward):
    """r(x) = slope · Σ x over the dimensions."""

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.slope * images.flatten(1).sum(1)


class Redness(RewardMetric):
    """Mean of red less blue."""

    is_differentiable = True

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 2]).flatten(1).mean(1)
