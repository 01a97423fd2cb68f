"""What every reward is: a torchmetrics metric with a per-image ``score``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def check_images(images: Tensor) -> None:
    """Refuse anything but a float batch (B, 3, H, W) with B >= 1 and finite values in [0, 1].

    Raises:
        TypeError: not a tensor, or an integer one.
        ValueError: wrong shape, empty batch, NaN or infinite values, values outside [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor (B, 3, H, W) in [0, 1], got {kind}; divide uint8 images by 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if images.shape[0] == 0:
        raise ValueError("images holds no image: the batch is empty")
    low, high = images.detach().aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("images holds NaN or infinite values")
    # 1e-3: rounding of a decoder's (x + 1) / 2 in half precision
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images must lie in [0, 1], got [{low.item():.4g}, {high.item():.4g}]")


class RewardMetric(Metric):
    """A reward of (image, prompt) pairs, higher is better.

    ``score`` returns one value per image and keeps no state; ``update`` and ``compute`` average it over batches and
    ranks. A subclass writes ``_score`` only.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    #: smallest and largest value the reward can take, in the units ``score`` returns; None where unbounded
    value_range: tuple[float | None, float | None] = (None, None)
    needs_prompt: bool = True

    total: Tensor
    total_squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_squares", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def differentiable(self) -> bool:
        """Whether ``score`` carries a gradient with respect to the images."""
        return bool(self.is_differentiable)

    @property
    def name(self) -> str:
        """The reward's name in logs, score tables and adapter metadata."""
        return type(self).__name__

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image against its prompt.

        Args:
            images: float tensor (B, 3, H, W) in [0, 1].
            prompts: B strings.

        Returns:
            float32 tensor (B,), one reward per image.

        Raises:
            TypeError, ValueError: images of another kind, or another number of prompts than images.
        """
        check_images(images)
        if isinstance(prompts, str) or len(prompts) != images.shape[0]:
            count = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"{self.name} needs one prompt per image: got {images.shape[0]} images and {count}")
        return self._score(images, list(prompts)).float()

    @abstractmethod
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``score`` without its checks."""

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add a batch to the running mean."""
        with torch.no_grad():
            scores = self.score(images, prompts).to(self.total)
        self.total += scores.sum()
        self.total_squares += scores.square().sum()
        self.count += scores.numel()

    def compute(self) -> Tensor:
        """Mean reward over everything seen, on all ranks: float32 scalar."""
        return (self.total / self.count).float()

    def standard_error(self) -> Tensor:
        """Standard error of ``compute``'s mean over what this rank has seen: float32 scalar, NaN below two images."""
        mean = self.total / self.count
        variance = (self.total_squares / self.count - mean.square()).clamp_min(0) * self.count / (self.count - 1)
        return (variance / self.count).sqrt().float()
