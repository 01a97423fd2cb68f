"""What a blend says of one denoising step: its rows, their gates and their mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

from torch import Tensor


class BlendStep(NamedTuple):
    """Rows and mix of one denoising step, on the CPU."""

    gates: Tensor  # (K, B, m) float32
    mix: Tensor  # (K, B) float64, sums to 1 over K
    factors: bool = False  # gate A and B apart (the paper code's Rewarded Soup)


class PartialStep(BlendStep):
    """A step that computes a part of its mix, ``now`` (K, B); the rest, mix − now, takes outputs of earlier steps.

    Those are of the last step at which all rows of the image's mix were computed. Where there is none, or for a reader
    that keeps none, it is the plain step of its mix.
    """

    now: Tensor

    @classmethod
    def of(cls, step: BlendStep, now: Tensor) -> Self:
        """A step and the part of its mix, float64 (K, B) with sum 1 over K, that is computed."""
        partial = cls(*step)
        partial.now = now
        return partial


#: what a blend returns for a run: step_index → BlendStep
BlendPlan = Callable[[int], BlendStep]
