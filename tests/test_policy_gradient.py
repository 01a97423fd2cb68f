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


def moments(values: list[float]) -> tuple[float, float]:
    sample = torch.tensor(values, dtype=torch.float64)
    return sample.mean().item(), sample.std(correction=0).item()


def test_prompt_statistics_are_the_mean_and_deviation_of_the_latest_rewards() -> None:
    statistics = PromptStatistics(window=3, min_count=2, min_group=9)
    statistics.update(torch.tensor([7, 7]), torch.tensor([100.0, 1.0]))
    statistics.update(torch.tensor([7, 7, 8]), torch.tensor([2.0, 6.0, 5.0]))
    mean, std = statistics(torch.tensor([7, 8, 9]))
    # 100 has left the window of 7; 8 has too few and 9 none, so theirs are of the latest three of all
    expected = [moments([1.0, 2.0, 6.0]), *[moments([2.0, 6.0, 5.0])] * 2]
    assert mean.tolist() == pytest.approx([each for each, _ in expected])
    assert std.tolist() == pytest.approx([each for _, each in expected])


def test_a_prompts_images_of_the_same_rollout_are_its_group_where_they_are_enough() -> None:
    statistics = PromptStatistics(window=32, min_count=8, min_group=4)
    statistics.update(torch.tensor([7] * 12), torch.full((12,), -3.0))  # a policy long gone
    statistics.update(torch.tensor([7, 8, 7, 8, 7, 7, 8]), torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 6.0, 9.0]))
    mean, std = statistics(torch.tensor([7, 8]))
    group, pool = moments([1.0, 2.0, 3.0, 6.0]), moments([-3.0] * 12 + [1.0, 9.0, 2.0, 9.0, 3.0, 6.0, 9.0])
    assert mean.tolist() == pytest.approx([group[0], pool[0]])  # three of 8 are not a group
    assert std.tolist() == pytest.approx([group[1], pool[1]])


def test_statistics_of_all_prompts_forget_and_do_not_grow() -> None:
    """A reward that rises from 0 to 4 over prompts seen once each: the baseline is the latest rollout's mean."""
    statistics = PromptStatistics(window=16, max_prompts=100)
    generator = torch.Generator().manual_seed(0)
    for rollout in range(200):
        ids = torch.arange(16) + 16 * rollout
        rewards = 4 * rollout / 199 + 0.3 * torch.randn(16, generator=generator)
        statistics.update(ids, rewards)
    mean, std = statistics(ids[:1])
    assert (mean.item(), std.item()) == pytest.approx(moments(rewards.tolist()), rel=1e-6)
    assert mean.item() == pytest.approx(4.0, abs=0.3)  # four standard errors of .3 / √16
    assert len(statistics.rewards) == 100
    assert len(statistics.pool) == 16
    statistics.update(torch.arange(40), torch.arange(40.0))  # a rollout above the window counts whole
    assert len(statistics.pool) == 40


def test_a_prompt_seen_again_is_the_last_to_be_forgotten() -> None:
    statistics = PromptStatistics(max_prompts=2)
    for prompt_id in (1, 2, 1, 3):
        statistics.update(torch.tensor([prompt_id]), torch.tensor([0.0]))
    assert list(statistics.rewards) == [1, 3]


def test_statistics_of_older_checkpoints_load() -> None:
    statistics = PromptStatistics(window=2)
    statistics.load_state_dict({"rewards": {1: [0.5, 1.0, 2.0], 2: [3.0]}})
    assert statistics.rewards == {1: [1.0, 2.0], 2: [3.0]}
    assert statistics.pool == [2.0, 3.0]


def test_prompt_statistics_survive_saving() -> None:
    statistics = PromptStatistics()
    statistics.update(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]))
    copy = PromptStatistics()
    copy.load_state_dict(statistics.state_dict())
    assert (copy.rewards, copy.pool) == (statistics.rewards, statistics.pool)
