"""The linear scalarisation of several rewards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dblightning.rewards import RewardMetric, WeightedReward


class Channel(RewardMetric):
    """The mean of one colour channel."""

    is_differentiable = True
    value_range = (0.0, 1.0)
    needs_prompt = False

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, self.channel].mean((-2, -1))


class Unbounded(Channel):
    is_differentiable = False
    value_range = (None, 5.0)
    needs_prompt = True


IMAGES = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_the_score_is_the_weighted_sum_of_the_parts() -> None:
    reward = WeightedReward({"red": Channel(0), "blue": Channel(2)}, {"blue": 0.25, "red": 0.75})
    expected = 0.75 * IMAGES[:, 0].mean((-2, -1)) + 0.25 * IMAGES[:, 2].mean((-2, -1))
    torch.testing.assert_close(reward.score(IMAGES, [""] * 4), expected)
    parts = reward.score_parts(IMAGES, [""] * 4)
    assert torch.equal(parts["blue"], IMAGES[:, 2].mean((-2, -1)))
    assert reward.name == "0.25*blue+0.75*red"


def test_a_weight_of_one_is_that_reward_alone() -> None:
    reward = WeightedReward({"red": Channel(0), "blue": Channel(2)}, {"red": 0.0, "blue": 1.0})
    assert torch.equal(reward.score(IMAGES, [""] * 4), Channel(2).score(IMAGES, [""] * 4))


def test_it_is_differentiable_bounded_and_promptless_when_its_parts_are() -> None:
    both = WeightedReward({"red": Channel(0), "blue": Channel(2)}, {"red": 0.5, "blue": 0.5})
    assert both.differentiable and not both.needs_prompt
    assert both.value_range == (0.0, 1.0)
    mixed = WeightedReward({"red": Channel(0), "loose": Unbounded(2)}, {"red": 0.5, "loose": 0.5})
    assert not mixed.differentiable and mixed.needs_prompt
    assert mixed.value_range == (None, 3.0)
    alone = WeightedReward({"red": Channel(0), "loose": Unbounded(2)}, {"red": 1.0, "loose": 0.0})
    assert alone.value_range == (0.0, 1.0)


def test_weights_are_normalized_on_request() -> None:
    reward = WeightedReward({"red": Channel(0), "blue": Channel(2)}, {"red": 3, "blue": 1}, normalize=True)
    assert reward.weights == {"red": 0.75, "blue": 0.25}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"red": 0.5, "blue": 0.6}, "sum to 1"),
        ({"red": 1.5, "blue": -0.5}, ">= 0"),
        ({"red": float("nan"), "blue": 1.0}, "sum to 1"),
        ({"red": 1.0}, "use the same names"),
    ],
)
def test_weights_that_are_no_mixture_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WeightedReward({"red": Channel(0), "blue": Channel(2)}, weights)
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedReward({}, {})
