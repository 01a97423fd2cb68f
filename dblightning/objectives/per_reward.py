"""Advantages of several rewards, each normalised by itself before they are summed (GDPO, 2601.05242)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dblightning.objectives.advantages import LEAST_SCALE, PromptStatistics
from dblightning.training_settings import Deviation


class Judged(NamedTuple):
    """Samples by their rewards together."""

    advantage: Tensor  # float64 (B,)
    varied: Tensor  # bool (B,), whether their prompt's images differ in any part; all where none do

    def among(self, these: Tensor) -> Judged:
        """They among others, bool (N,): NaN and False for those."""
        advantage = torch.full((len(these),), torch.nan, dtype=torch.float64)
        varied = torch.zeros(len(these), dtype=torch.bool)
        advantage[these], varied[these] = self.advantage, self.varied
        return Judged(advantage, varied)


def per_reward_advantages(
    prompt_ids: Tensor, parts: Mapping[str, Tensor], weights: Mapping[str, float], deviation: Deviation = "group"
) -> Judged:
    """A = standardised Σ_k w_k z_k with z_k = (r_k − mean of its prompt) / deviation, over one rollout.

    A weighted sum of raw rewards lets the one of largest variance rule; here each has the influence of its weight. The
    sum is standardised over the rollout: less its mean, by its deviation (at least 1e-3, as every deviation here).

    Args:
        prompt_ids: of the images of all ranks, int64 (B,); those of one prompt are a group.
        parts: name → scores, finite, (B,).
        weights: name → w_k.
        deviation: of z_k: of the prompt's images ("group") or of all ("global").

    Returns:
        The samples' advantages and whether their groups vary.
    """
    total = torch.zeros(len(prompt_ids), dtype=torch.float64)
    varied = torch.zeros(len(prompt_ids), dtype=torch.bool)
    for name, scores in parts.items():
        statistics = PromptStatistics(groups_only=True, deviation=deviation)
        statistics.update(prompt_ids, scores)
        mean, scale = (each.double() for each in statistics(prompt_ids))
        total += weights[name] * (scores.double() - mean) / scale.clamp_min(LEAST_SCALE)
        varied |= statistics.differs(prompt_ids)
    standardised = (total - total.mean()) / total.std(correction=0).clamp_min(LEAST_SCALE)
    return Judged(standardised, varied if bool(varied.any()) else torch.ones_like(varied))
