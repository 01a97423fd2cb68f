from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from dblightning.objectives import GRPO
from dblightning.objectives.advantages import PromptStatistics, advantages, check_groups
from dblightning.replay import ReplayBuffer, Transitions
from dblightning.rollout import Trajectory
from dblightning.training_rules import DEFAULTS
from dblightning.training_settings import TrainingSettings
from tests.toy import GaussianBackbone
from tests.toy_fit import data, trainer
from tests.toy_fit import module as quick
from tests.toy_optimum import converged, module, optimal_shift
from tests.toy_rewards import LinearReward

GROUP = {"baseline": "group"}
QUICK = {"buffer_size": None, "objective": GRPO(0.5), "advantage": GROUP}


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_grpo_with_two_passes_per_rollout_finds_the_optimum_of_eq_4(tmp_path: Path, alpha: float) -> None:
    backbone = GaussianBackbone()
    run = module(backbone, objective=GRPO(0.5), kl_weight=alpha, advantage=GROUP, optimisation={"epochs": 2},
                 learning_rate=0.01, policy_batch_size=512)  # fmt: skip
    found = converged(tmp_path, run, samples_per_prompt=64)
    # 5 %: the noise left after averaging, and 1/64 that a group's mean takes of each of its own rewards
    assert found.item() == pytest.approx(optimal_shift(backbone, run.solver, 0.5, alpha), rel=0.05)


def facts(reward: list[float], prompt_ids: list[int], **settings: Any) -> torch.Tensor:
    statistics = PromptStatistics(groups_only=True, **settings)
    ids, rewards = torch.tensor(prompt_ids), torch.tensor(reward)
    statistics.update(torch.tensor([1, 2, 9]), torch.tensor([50.0, 60.0, 70.0]))  # another rollout
    statistics.update(ids, rewards)
    return torch.stack([rewards, *statistics(ids)])


def advantage(table: torch.Tensor, clip: float | None = None) -> list[float]:
    reward, baseline, scale = table
    none = torch.zeros(len(reward))
    steps = Transitions(none, none, none.long(), none, reward, baseline, scale, none.long(), none.long())
    return advantages(steps, "group", None, normalize=True, clip=clip).tolist()


@pytest.mark.parametrize("deviation", ["group", "global"])
def test_the_advantage_is_the_formula_in_float64(deviation: str) -> None:
    rewards, ids = [1.0, 2.0, 6.0, -3.0, -1.0], [1, 1, 1, 2, 2]
    found = advantage(facts(rewards, ids, deviation=deviation))
    r = torch.tensor(rewards, dtype=torch.float64)
    groups = [r[:3], r[3:]]
    mean = torch.cat([group.mean().expand(len(group)) for group in groups])
    by_group = torch.cat([(group - group.mean()).square().mean().sqrt().expand(len(group)) for group in groups])
    std = by_group if deviation == "group" else (r - r.mean()).square().mean().sqrt()
    assert found == pytest.approx(((r - mean) / std).tolist(), rel=1e-6)


def test_the_advantage_is_clipped_on_both_sides() -> None:
    table = facts([10.0] + [0.0] * 99, [1] * 100)
    assert max(advantage(table)) > 9
    assert max(advantage(table, clip=5.0)) == 5
    assert min(advantage(torch.cat([-table[:2], table[2:]]), clip=5.0)) == -5


def test_groups_whose_rewards_are_all_alike_are_left_out() -> None:
    statistics = PromptStatistics(groups_only=True)
    ids = torch.tensor([1, 1, 2, 2, 3, 3])
    statistics.update(ids, torch.tensor([1.0, 2.0, 5.0, 5.0, 0.0, 0.1]))
    assert statistics.varied(ids).tolist() == [True, True, False, False, True, True]
    statistics.update(ids, torch.ones(6))
    assert statistics.varied(ids).all(), "where none varies, all stay: the KL term needs them"


class OneFlat(LinearReward):
    """The same reward for every image of prompt 0."""

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return super()._score(images, prompts) * torch.tensor([float(prompt != "prompt 0") for prompt in prompts])


def test_a_flat_group_is_not_trained_on(tmp_path: Path) -> None:
    run = quick(OneFlat(), **QUICK | {"advantage": GROUP | {"drop_flat_groups": True}})
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(run, datamodule=data(tmp_path, prompts=2, samples_per_prompt=2, rollouts_per_epoch=1))
    assert run.replay is not None
    assert run.replay.prompt_ids[: run.replay.size].tolist() == [1, 1]


@pytest.mark.parametrize(("trajectories", "steps", "count"), [(6, 4, 8), (5, 3, 4), (2, 2, 7)])
def test_a_pass_has_every_stored_step_exactly_once(trajectories: int, steps: int, count: int) -> None:
    buffer = ReplayBuffer(trajectories, steps + 1, (1, 1, 1))
    nothing = torch.zeros(trajectories)
    walk = Trajectory(torch.zeros(steps + 2, trajectories, 1, 1, 1), torch.zeros(steps + 1, trajectories))
    buffer.add(walk, nothing.long(), nothing, nothing, nothing)
    batches = list(buffer.epoch(count, lambda lane: lane, last_step=steps))
    seen = [pair for slots, at in batches for pair in zip(slots.tolist(), at.tolist(), strict=True)]
    assert sorted(seen) == [(slot, step) for slot in range(trajectories) for step in range(steps)]
    assert [len(slots) for slots, _ in batches[:-1]] == [count] * (len(batches) - 1)
    other = [slots.tolist() for slots, _ in buffer.epoch(count, lambda lane: lane + 99, last_step=steps)]
    assert other != [slots.tolist() for slots, _ in batches] or trajectories * steps <= count


def test_a_pass_of_two_ranks_is_that_of_one_process_with_both_shares() -> None:
    def buffer(rows: list[int]) -> ReplayBuffer:
        made = ReplayBuffer(len(rows), 4, (1, 1, 1))
        count = torch.zeros(len(rows))
        walk = Trajectory(torch.zeros(5, len(rows), 1, 1, 1), torch.zeros(4, len(rows)))
        made.add(walk, torch.tensor(rows), count, count, count)
        return made

    def order(made: ReplayBuffer, count: int, rank: int) -> list[list[tuple[int, int]]]:
        return [
            list(zip(made.prompt_ids[slots].tolist(), steps.tolist(), strict=True))
            for slots, steps in made.epoch(count, lambda lane: lane, rank=rank)
        ]

    halves = [order(buffer(rows), 3, rank) for rank, rows in enumerate(([0, 1, 2], [3, 4, 5]))]
    assert [one + other for one, other in zip(*halves, strict=True)] == order(buffer([0, 1, 2, 3, 4, 5]), 6, 0)


def test_each_epoch_takes_the_optimiser_steps_that_a_pass_needs(tmp_path: Path) -> None:
    run = quick(**QUICK, optimisation={"epochs": 3}, gradient_accumulation=2, policy_batch_size=3)
    sizes: list[int] = []
    losses, step = run._losses, run._step
    run._losses = lambda parts, *rest: (sizes.append(len(parts[0][1].reward)), losses(parts, *rest))[1]  # type: ignore
    steps: list[None] = []
    run._step = lambda *given: (steps.append(None), step(*given))[1]  # type: ignore
    trainer(tmp_path, max_epochs=1).fit(run, datamodule=data(tmp_path, samples_per_prompt=2, rollouts_per_epoch=1))
    # 4 images of 4 steps are 16 transitions: five batches of three and one of one, in pairs
    assert sizes == [3, 3, 3, 3, 3, 1] * 3
    assert len(steps) == 3 * 3


def test_every_transition_of_a_pass_counts_alike(tmp_path: Path) -> None:
    """The gradients of a pass's steps sum to the pass's mean gradient, whatever the batches."""

    def total(batch_size: int) -> float:
        run = quick(**QUICK, optimisation={"epochs": 1}, policy_batch_size=batch_size, kl_weight=0.3)
        found: list[float] = []

        def step(optimizer: Any, parameters: Any) -> None:
            (parameter,) = parameters
            found.append(float(parameter.grad.sum()))
            parameter.grad = None

        run._step = step  # type: ignore
        trainer(tmp_path, max_epochs=1).fit(run, datamodule=data(tmp_path, samples_per_prompt=2, rollouts_per_epoch=1))
        return sum(found) * batch_size / 16

    assert total(3) == pytest.approx(total(16), rel=1e-4)  # float32 sums
    assert abs(total(16)) > 1e-3


def test_a_group_of_one_is_refused_before_the_rollout(tmp_path: Path) -> None:
    run = quick(**QUICK)
    run.roll_out = None  # type: ignore
    with pytest.raises(ValueError, match="samples_per_prompt to 2 or more"):
        trainer(tmp_path, max_epochs=1).fit(run, datamodule=data(tmp_path))
    check_groups(torch.tensor([4, 5, 4, 5]))
    with pytest.raises(ValueError, match="1 of this rollout's 2 prompts have one image"):
        check_groups(torch.tensor([4, 5, 4]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimisation": {"epochs": 2}}, "set replay.buffer_size to null"),
        ({"objective": GRPO()}, "GRPO compares the images of a prompt.*set advantage.baseline to group"),
        ({"advantage": {"drop_flat_groups": True}}, "drop_flat_groups"),
        ({"advantage": {"clip": 0}}, "advantage.clip must be > 0"),
        ({"optimisation": {"epochs": 0}}, "epochs must be a whole number >= 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**{"advantage": "value"} | settings)


def test_the_rules_know_the_defaults() -> None:
    groups = dict(TrainingSettings.of(*[{}] * len(fields(TrainingSettings))).groups())
    assert {group: {name: groups[group][name] for name in each} for group, each in DEFAULTS.items()} == DEFAULTS
