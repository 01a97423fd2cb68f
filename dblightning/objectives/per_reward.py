"""Advantages of several rewards, each normalised by itself before they are summed (GDPO, 2601.05242)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dblightning.objectives.advantages import LEAST_SCALE, PromptStatistics
from dblightning.training_settings import Deviation


def per_reward_advantages(
    prompt_ids: Tensor, parts: Mapping[str, Tensor], weights: Mapping[str, float], deviation: Deviation = "group"
) -> tuple[Tensor, Tensor]:
    """A = standardised Σ_k w_k z_k with z_k = (r_k − mean of its prompt) / deviation, over one rollout.

    A weighted sum of raw rewards lets the one of largest variance rule; here each has the influence of its weight. The
    sum is standardised over the rollout: less its mean, by its deviation (at least 1e-3, as every deviation here).

    Args:
        prompt_ids: of the images of all ranks, int64 (B,); those of one prompt are a group.
        parts: name → scores, finite, (B,).
        weights: name → w_k.
        deviation: of z_k: of the prompt's images ("group") or of all ("global").

    Returns:
        Advantages, float64 (B,), and whether a prompt's images differ in any part, bool (B,); all where none do.
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
    return standardised, varied if bool(varied.any()) else torch.ones_like(varied)
