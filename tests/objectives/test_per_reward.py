from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from dblightning.module import RewardRLModule
from dblightning.objectives.per_reward import per_reward_advantages
from dblightning.rewards import WeightedReward
from dblightning.rewards.base import RewardMetric
from tests.toy_fit import data, trainer
from tests.toy_fit import module as quick
from tests.toy_rewards import AnyTensorReward

IDS = torch.tensor([1, 2, 1, 2, 1, 2])
PARTS = {
    "large": torch.tensor([100.0, -50.0, 300.0, 70.0, 250.0, 10.0]),
    "small": torch.tensor([0.3, 0.1, 0.1, 0.4, 0.2, 0.15]),
}
WEIGHTS = {"large": 0.25, "small": 0.75}


@pytest.mark.parametrize("deviation", ["group", "global"])
def test_the_advantage_is_gdpos_formula_in_float64(deviation: str) -> None:
    total = [0.0] * 6
    for name, scores in PARTS.items():
        values = [float(value) for value in scores]
        for i, prompt in enumerate(IDS.tolist()):
            group = [value for value, other in zip(values, IDS.tolist(), strict=True) if other == prompt]
            mean, wide = sum(group) / 3, group if deviation == "group" else values
            centre = sum(wide) / len(wide)
            std = (sum((value - centre) ** 2 for value in wide) / len(wide)) ** 0.5
            total[i] += WEIGHTS[name] * (values[i] - mean) / std
    centre = sum(total) / 6
    std = (sum((value - centre) ** 2 for value in total) / 6) ** 0.5
    found, varied = per_reward_advantages(IDS, PARTS, WEIGHTS, deviation)  # type: ignore[arg-type]
    # 1e-5: group moments are kept in float32
    assert found.tolist() == pytest.approx([(value - centre) / std for value in total], rel=1e-5)
    assert varied.all()


def test_the_unit_of_a_reward_does_not_matter() -> None:
    whole, _ = per_reward_advantages(IDS, PARTS, WEIGHTS)
    scaled, _ = per_reward_advantages(IDS, PARTS | {"large": PARTS["large"] / 7 + 3}, WEIGHTS)
    torch.testing.assert_close(whole, scaled, rtol=1e-4, atol=1e-5)  # float32 moments


def test_a_flat_part_counts_nothing_and_a_group_flat_in_all_is_named() -> None:
    flat = torch.ones(6)
    found, _ = per_reward_advantages(IDS, {"large": flat, "small": PARTS["small"]}, WEIGHTS)
    alone, _ = per_reward_advantages(IDS, {"small": PARTS["small"]}, {"small": 1.0})
    torch.testing.assert_close(found, alone)
    half = torch.where(IDS == 1, 1.0, PARTS["small"])
    _, varied = per_reward_advantages(IDS, {"large": flat, "small": half}, WEIGHTS)
    assert varied.tolist() == (IDS == 2).tolist()
    none, varied = per_reward_advantages(IDS, {"large": flat, "small": flat}, WEIGHTS)
    assert none.tolist() == [0.0] * 6
    assert varied.all()


class Channel(RewardMetric):
    """A channel's mean; counts the images that it scores."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel, self.scored = channel, 0

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.scored += len(prompts)
        return images[:, self.channel].mean((-2, -1))


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_weighted_reward_scores_each_part_once_and_gives_the_same_sum(micro_batch_size: int | None) -> None:
    reward = WeightedReward(
        {"red": Channel(0), "blue": Channel(2)}, {"red": 0.3, "blue": 0.7}, micro_batch_size=micro_batch_size
    )
    images, prompts = torch.rand(5, 3, 4, 4), ["a"] * 5
    total, parts = reward.score_with_parts(images, prompts)
    assert [part.scored for part in reward.rewards.values()] == [5, 5]  # type: ignore[union-attr]
    assert sorted(parts) == ["blue", "red"]
    assert torch.equal(parts["blue"], images[:, 2].mean((-2, -1)))
    assert torch.equal(total, reward.score(images, prompts))
    alone, none = Channel(1).score_with_parts(images, prompts)
    assert torch.equal(alone, images[:, 1].mean((-2, -1)))
    assert none == {}


class Sum(AnyTensorReward):
    """A multiple of the sum of a picture that is any tensor."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.slope * images[:, 0].flatten(1).sum(1) + images[:, 1].flatten(1).sum(1).square() / self.slope


def fitted(folder: Path, reward: RewardMetric, **settings: Any) -> tuple[RewardRLModule, dict[str, float]]:
    run = quick(
        reward,
        adapter_name="mine",
        **({"advantage": {"baseline": "group", "per_reward": True}, "buffer_size": None} | settings),
    )
    seen: dict[str, float] = {}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    fit = trainer(folder, max_epochs=1, callbacks=[Record()])
    fit.fit(run, datamodule=data(folder, samples_per_prompt=4, batch_size=8, rollouts_per_epoch=1))
    return run, seen


def two(**options: Any) -> WeightedReward:
    return WeightedReward({"up": Sum(100.0), "down": Sum(-0.01)}, {"up": 0.25, "down": 0.75}, **options)


@pytest.mark.parametrize("sampling", [{}, {"rollout_batch_size": 4, "overlap_reward": True}])
def test_a_run_stores_the_advantage_and_logs_each_part(tmp_path: Path, sampling: dict[str, Any]) -> None:
    run, seen = fitted(tmp_path, two(), **sampling)
    replay = run.replay
    assert replay is not None
    images, ids = replay.latents[:8, -1], replay.prompt_ids[:8]
    parts = two().score_parts(images, ["a"] * 8)
    expected, _ = per_reward_advantages(ids, parts, {"up": 0.25, "down": 0.75})
    rows = replay.transitions(torch.arange(8), torch.zeros(8, dtype=torch.long), "cpu")
    # 1e-3: the reward is stored in float32, and the advantage is a difference to it
    assert run.advantages(rows).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert seen["train/reward/up"] == pytest.approx(parts["up"].mean().item(), rel=1e-5)
    assert seen["train/reward/down"] == pytest.approx(parts["down"].mean().item(), rel=1e-5)
    assert seen["train/reward"] == pytest.approx((0.25 * parts["up"] + 0.75 * parts["down"]).mean().item(), rel=1e-5)


def test_a_part_that_is_nan_drops_its_sample(tmp_path: Path) -> None:
    class Broken(Sum):
        def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
            scores = super()._score(images, prompts)
            return torch.cat([scores[:1] * torch.nan, scores[1:]])

    reward = WeightedReward({"up": Sum(100.0), "down": Broken(-0.01)}, {"up": 0.25, "down": 0.75})
    run, seen = fitted(tmp_path, reward)
    assert run.replay is not None
    assert run.replay.size == 7
    assert seen["train/dropped_samples"] == 1
    rows = run.replay.transitions(torch.arange(7), torch.zeros(7, dtype=torch.long), "cpu")
    assert torch.isfinite(run.advantages(rows)).all()


@pytest.mark.parametrize(
    ("reward", "advantage", "message"),
    [
        (Sum(1.0), {"baseline": "group", "per_reward": True}, "Sum has none"),
        (two(), {"baseline": "prompt", "per_reward": True}, "per_reward compares within groups"),
    ],
)
def test_per_reward_without_parts_or_groups_is_refused(reward: Any, advantage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(reward, advantage=advantage)
