from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dblightning.policy_gradient import (
    PromptStatistics,
    clip_fraction,
    dpok_objective,
    explained_variance,
    ppo_objective,
)


def gradient(objective: object, advantage: float, ratio: float) -> float:
    x = torch.tensor([ratio], requires_grad=True)
    value: Tensor = objective(torch.tensor([advantage]), x, 0.1)  # type: ignore[operator]
    value.sum().backward()
    assert x.grad is not None
    return x.grad.item()


@pytest.mark.parametrize("objective", [dpok_objective, ppo_objective])
@pytest.mark.parametrize("advantage", [2.0, -3.0])
def test_at_ratio_one_the_gradient_is_the_advantage(objective: object, advantage: float) -> None:
    assert gradient(objective, advantage, 1.0) == pytest.approx(advantage)


@pytest.mark.parametrize(
    ("advantage", "ratio", "dpok", "ppo"),
    [
        (2.0, 1.2, 0.0, 0.0),  # moved far enough in the right direction: both stop
        (-3.0, 0.8, 0.0, 0.0),
        (2.0, 0.8, 0.0, 2.0),  # moved the wrong way: only PPO brings it back
        (-3.0, 1.2, 0.0, -3.0),
    ],
)
def test_outside_the_clip_dpok_is_flat_and_ppo_still_corrects(
    advantage: float, ratio: float, dpok: float, ppo: float
) -> None:
    assert gradient(dpok_objective, advantage, ratio) == pytest.approx(dpok)
    assert gradient(ppo_objective, advantage, ratio) == pytest.approx(ppo)


def test_ppo_is_the_smaller_of_clipped_and_unclipped() -> None:
    advantage, ratio = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([0.5, 1.5, 0.5, 1.5])
    assert ppo_objective(advantage, ratio, 0.1).tolist() == pytest.approx([0.5, 1.1, -0.9, -1.5])


def test_clip_fraction_counts_both_sides() -> None:
    assert clip_fraction(torch.tensor([0.8, 0.95, 1.0, 1.05, 1.2]), 0.1).item() == pytest.approx(0.4)


def test_explained_variance_is_one_for_a_perfect_and_zero_for_a_constant_prediction() -> None:
    target = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(target, target).item() == 1
    assert explained_variance(torch.full((3,), 9.0), target).item() == pytest.approx(0)
    assert explained_variance(target, torch.ones(3)).isnan()


def test_prompt_statistics_are_the_mean_and_deviation_of_the_latest_rewards() -> None:
    statistics = PromptStatistics(window=3, min_count=2)
    statistics.update(torch.tensor([7, 7, 7, 7, 8]), torch.tensor([100.0, 1.0, 2.0, 6.0, 5.0]))
    mean, std = statistics(torch.tensor([7, 8, 9]))
    pooled = torch.tensor([1.0, 2.0, 6.0, 5.0])  # 100 has left the window; 8 has too few, 9 has none
    assert mean.tolist() == pytest.approx([3.0, pooled.mean().item(), pooled.mean().item()])
    own = torch.tensor([1.0, 2.0, 6.0]).std(correction=0).item()
    assert std.tolist() == pytest.approx([own, *[pooled.std(correction=0).item()] * 2])


def test_prompt_statistics_survive_saving() -> None:
    statistics = PromptStatistics()
    statistics.update(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]))
    copy = PromptStatistics()
    copy.load_state_dict(statistics.state_dict())  # type: ignore[arg-type]
    assert copy.rewards == statistics.rewards
