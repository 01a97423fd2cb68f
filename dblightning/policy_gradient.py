"""The maths of the policy update: objectives, advantages, diagnostics. Pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def dpok_objective(advantage: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """DPOK's surrogate, advantage · clamp(ratio, 1−c, 1+c), per sample (B,); to be maximised.

    The clamp is hard: outside the range a sample has no gradient in either direction (Fan et al. 2023, and the code
    of Diffusion Blend).

    Args:
        advantage: (B,), no gradient.
        ratio: p_θ(x_{t-1}|x_t) / p_old(x_{t-1}|x_t), (B,).
        clip_range: c > 0; the paper's 1e-4 is made for log-probs averaged over dimensions.
    """
    return advantage * ratio.clamp(1 - clip_range, 1 + clip_range)


def ppo_objective(advantage: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic surrogate, min(A·ratio, A·clamp(ratio)), per sample (B,); to be maximised.

    Unlike :func:`dpok_objective` it keeps the gradient that brings a ratio back (Schulman et al. 2017, eq. 7).
    """
    return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


OBJECTIVES = {"dpok": dpok_objective, "ppo": ppo_objective}


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Share of ratios outside [1−c, 1+c]: scalar in [0, 1]."""
    return ((ratio - 1).abs() > clip_range).float().mean()


def explained_variance(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 − Var(target − prediction) / Var(target): 1 perfect, 0 no better than the mean; NaN for constant targets."""
    variance = targets.var(correction=0)
    return torch.where(variance > 0, 1 - (targets - predictions).var(correction=0) / variance, torch.nan)


class PromptStatistics:
    """Running mean and standard deviation of each prompt's recent rewards (the per-prompt baseline of DDPO).

    Args:
        window: how many of a prompt's latest rewards are kept.
        min_count: below this many, the statistics of all prompts together are used.
    """

    def __init__(self, window: int = 32, min_count: int = 8) -> None:
        if window < 1 or min_count < 1:
            raise ValueError(f"window and min_count must be at least 1, got {window} and {min_count}")
        self.window = window
        self.min_count = min_count
        self.rewards: dict[int, list[float]] = {}

    def update(self, prompt_ids: Tensor, rewards: Tensor) -> None:
        """Add each image's reward under its prompt; both (B,)."""
        for prompt_id, reward in zip(prompt_ids.tolist(), rewards.tolist(), strict=True):
            kept = self.rewards.setdefault(prompt_id, [])
            kept.append(reward)
            del kept[: -self.window]

    def __call__(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation for each image's prompt, both float32 (B,)."""
        pooled = [reward for kept in self.rewards.values() for reward in kept]
        means, stds = [], []
        for prompt_id in prompt_ids.tolist():
            kept = self.rewards.get(prompt_id, [])
            sample = torch.tensor(kept if len(kept) >= self.min_count else pooled, dtype=torch.float64)
            means.append(sample.mean() if len(sample) else torch.tensor(0.0))
            stds.append(sample.std(correction=0) if len(sample) > 1 else torch.tensor(0.0))
        return torch.stack(means).float(), torch.stack(stds).float()

    def state_dict(self) -> dict[str, object]:
        return {"rewards": {prompt_id: list(kept) for prompt_id, kept in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, dict[int, list[float]]]) -> None:
        self.rewards = {prompt_id: list(kept) for prompt_id, kept in state["rewards"].items()}
