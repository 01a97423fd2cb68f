"""Means, gains and paired differences of candidates, over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dblightning.evaluation.intervals import interval, resample, unit_means

#: bootstrap samples of an interval
SAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """A number with its 95 % interval, bootstrap over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def beside(first: np.ndarray, second: np.ndarray, seeds: int) -> np.ndarray:
    """Two sets of images of the same prompts as one, (prompts · 2 seeds, rewards), a prompt's images side by side."""
    parts = [each.reshape(-1, seeds, each.shape[-1]) for each in (first, second)]
    return np.concatenate(parts, axis=1).reshape(-1, first.shape[-1])


def gains_of(rewards: np.ndarray, base: np.ndarray, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean paired gains over the base and their standard errors over prompts, each (rewards,)."""
    gains = (rewards - base).reshape(-1, seeds, rewards.shape[-1]).mean(1)
    return gains.mean(0), gains.std(0, ddof=1) / math.sqrt(len(gains))


def compared(
    first: np.ndarray, second: np.ndarray, seeds: int, merit: Callable[[np.ndarray], np.ndarray]
) -> Comparison:
    """A merit of mean rewards, one's less another's, paired; bootstrap over prompts."""
    starts = np.arange(0, len(first), seeds)
    means = [unit_means(each, starts) for each in (first, second)]
    weights = resample(len(starts), SAMPLES, 0)
    draws = merit(weights @ means[0]) - merit(weights @ means[1])
    low, high = interval(draws, len(starts))
    value = float(merit(means[0].mean(0)) - merit(means[1].mean(0)))
    return Comparison(value, float(low), float(high))
