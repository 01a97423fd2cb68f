"""Advantages: rewards less a baseline, which is a prompt's mean reward, a value function, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dblightning.replay import ABSENT, Transitions
from dblightning.settings import check, check_settings, count
from dblightning.training_settings import AdvantageSettings, Baseline, Deviation

#: least deviation to divide by: a prompt whose images all score alike has no signal, and must not be blown up
LEAST_SCALE = 1e-3


def value_target(transitions: Transitions, baseline: Baseline) -> Tensor:
    """Target of the value function, (B,): the reward, less the prompt's mean where that is a baseline too."""
    return transitions.reward - transitions.baseline if baseline == "both" else transitions.reward


def advantages(
    transitions: Transitions,
    baseline: Baseline,
    value: Tensor | None,
    normalize: bool,
    clip: float | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """Advantage of each transition, (B,).

    Args:
        transitions: (B, …).
        baseline: "value", "prompt", "both" or "group".
        value: the value function's prediction of :func:`value_target`, (B,); None where the baseline is a mean alone.
        normalize: divide by the deviation in ``transitions.scale``.
        clip: largest absolute value, of the reward's part; None: no limit.
        alpha: α of eq. (4), for the KL to go where transitions have it.
    """
    if value is None:
        advantage = transitions.reward - transitions.baseline
    else:
        advantage = value_target(transitions, baseline) - value
    if normalize:
        advantage = advantage / transitions.scale.clamp_min(LEAST_SCALE)
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    return advantage if transitions.kl_to_go is ABSENT else advantage - alpha * transitions.kl_to_go


def explained_variance(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 − Var(target − prediction) / Var(target): 1 perfect, 0 no better than the mean; NaN for constant targets."""
    variance = targets.var(correction=0)
    return torch.where(variance > 0, 1 - (targets - predictions).var(correction=0) / variance, torch.nan)


def check_groups(prompt_ids: Tensor) -> None:
    """Refuse a rollout in which a prompt has one image, which has no group to be compared with.

    Args:
        prompt_ids: of the images of all ranks, int64 (B,).

    Raises:
        ValueError: naming the prompt's id.
    """
    ids, sizes = prompt_ids.unique(return_counts=True)
    alone = ids[sizes == 1].tolist()
    check(
        not alone,
        "advantage.baseline group compares a prompt's images of one rollout with each other, and "
        f"{len(alone)} of this rollout's {len(ids)} prompts have one image (prompt_id {alone[:1]}); set the data's "
        "samples_per_prompt to 2 or more, or take baseline prompt",
    )


@dataclass(eq=False)
class PromptStatistics:
    """Mean and standard deviation of each prompt's rewards, the baseline of DDPO and GRPO.

    Taken over the prompt's own rewards in the latest rollout where there are enough, because older ones are of another
    policy; else over its latest rewards; else over the latest rewards of all prompts. Memory is bounded.

    Args:
        window: how many of a prompt's latest rewards are kept.
        min_count: fewest of a prompt's latest rewards to take statistics of.
        min_group: fewest of a prompt's rewards in one rollout to take statistics of.
        max_prompts: prompts kept; those seen longest ago are forgotten.
        groups_only: take the prompt's rewards in the latest rollout, however few (GRPO).
        deviation: "group", of the same rewards as the mean, or "global", of all rewards of the latest rollout.
    """

    window: int = 32
    min_count: int = 8
    min_group: int = 4
    max_prompts: int = 4096
    groups_only: bool = False
    deviation: Deviation = "group"

    def __post_init__(self) -> None:
        check_settings(vars(self), {name: count() for name in ("window", "min_count", "min_group", "max_prompts")})
        self.rewards: dict[int, list[float]] = {}  # by prompt, the one seen longest ago first
        self.group: dict[int, list[float]] = {}  # of the latest rollout, by prompt
        self.pool: list[float] = []  # of all prompts: the latest rollout's, and earlier ones up to the window

    @classmethod
    def of(cls, settings: AdvantageSettings) -> PromptStatistics:
        """Statistics as a run's settings want them."""
        only = settings.baseline == "group"
        return cls(settings.statistics_window, groups_only=only, deviation=settings.deviation)

    def update(self, prompt_ids: Tensor, rewards: Tensor) -> None:
        """Add a rollout: each image's reward under its prompt; both (B,)."""
        self.group = {}
        for prompt_id, reward in zip(prompt_ids.tolist(), rewards.tolist(), strict=True):
            self.group.setdefault(prompt_id, []).append(reward)
        for prompt_id, new in self.group.items():
            self.rewards[prompt_id] = [*self.rewards.pop(prompt_id, []), *new][-self.window :]
        for prompt_id in list(self.rewards)[: -self.max_prompts]:
            del self.rewards[prompt_id]
        self.pool = [*self.pool, *rewards.tolist()][-max(self.window, len(rewards)) :]

    def __call__(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation for each image's prompt, both float32 (B,)."""
        means, stds = [], []
        everyone = torch.tensor([reward for group in self.group.values() for reward in group], dtype=torch.float64)
        for prompt_id in prompt_ids.tolist():
            sample = torch.tensor(self._sample(prompt_id), dtype=torch.float64)
            means.append(sample.mean() if len(sample) else torch.tensor(0.0))
            sample = everyone if self.deviation == "global" else sample
            stds.append(sample.std(correction=0) if len(sample) > 1 else torch.tensor(0.0))
        return torch.stack(means).float(), torch.stack(stds).float()

    def varied(self, prompt_ids: Tensor) -> Tensor:
        """Which images are of a prompt whose rewards in the latest rollout differ, bool (B,).

        All of them where no prompt's do: then only the KL term has something to say.
        """
        differs = self.differs(prompt_ids)
        return differs if any(max(group) > min(group) for group in self.group.values()) else torch.ones_like(differs)

    def differs(self, prompt_ids: Tensor) -> Tensor:
        """Which images are of a prompt whose rewards in the latest rollout differ, bool (B,)."""
        varied = {prompt_id for prompt_id, group in self.group.items() if max(group) > min(group)}
        return torch.tensor([prompt_id in varied for prompt_id in prompt_ids.tolist()], dtype=torch.bool)

    def _sample(self, prompt_id: int) -> list[float]:
        group, kept = self.group.get(prompt_id, []), self.rewards.get(prompt_id, [])
        if self.groups_only or len(group) >= self.min_group:
            return group
        return kept if len(kept) >= self.min_count else self.pool

    def state_dict(self) -> dict[str, Any]:
        """The windows of rewards, for a checkpoint."""
        rewards = {prompt_id: list(kept) for prompt_id, kept in self.rewards.items()}
        return {"rewards": rewards, "pool": list(self.pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, of an earlier version too."""
        self.rewards = {prompt_id: list(kept)[-self.window :] for prompt_id, kept in state["rewards"].items()}
        # checkpoints of version 0.1.0 have no pool
        everything = [reward for kept in self.rewards.values() for reward in kept]
        self.pool = list(state.get("pool", everything[-self.window :]))
        self.group = {}
