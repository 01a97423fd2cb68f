from __future__ import annotations

import itertools

import pytest
import torch

from dblightning.replay import ReplayBuffer
from dblightning.sampling import Trajectory

STEPS, SHAPE = 5, (2, 3, 3)


def fill(buffer: ReplayBuffer, batch: int, tag: float) -> Trajectory:
    """Add a rollout whose reward names it: ``tag`` + image index / 100."""
    walk = Trajectory(torch.randn(STEPS + 1, batch, *SHAPE), torch.randn(STEPS, batch))
    reward = tag + torch.arange(batch) / 100
    buffer.add(walk, torch.arange(batch), reward, reward - 1, reward + 1)
    return walk


def everything(buffer: ReplayBuffer) -> torch.Tensor:
    """Steps in one whole pass, by (slot, step)."""
    slots, steps = next(buffer.batches(buffer.size * STEPS, torch.Generator().manual_seed(0)))
    return torch.stack([slots, steps])


def test_a_transition_is_what_was_rolled_out() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    walk = fill(buffer, 3, 1.0)
    got = buffer.transitions(torch.tensor([2, 0]), torch.tensor([4, 1]), "cpu")
    assert torch.equal(got.latents, torch.stack([walk.latents[4, 2], walk.latents[1, 0]]))
    assert torch.equal(got.next_latents, torch.stack([walk.latents[5, 2], walk.latents[2, 0]]))
    assert torch.equal(got.log_prob, torch.stack([walk.log_probs[4, 2], walk.log_probs[1, 0]]))
    assert got.reward.tolist() == pytest.approx([1.02, 1.0])
    assert got.baseline.tolist() == pytest.approx([0.02, 0.0])
    assert got.scale.tolist() == pytest.approx([2.02, 2.0])
    assert got.prompt_id.tolist() == [2, 0]
    assert got.step_index.tolist() == [4, 1]


def test_after_eviction_every_timestep_is_held_equally_often_and_the_oldest_are_gone() -> None:
    buffer = ReplayBuffer(7, STEPS, SHAPE)
    for tag in range(4):
        fill(buffer, 3, float(tag))
    slots, steps = everything(buffer)
    assert torch.bincount(steps).tolist() == [7] * STEPS
    rewards = buffer.transitions(slots, steps, "cpu").reward.floor()
    # 12 rolled out, 7 kept: three of the last two rollouts, one of the second
    assert {tag: int((rewards == tag).sum()) for tag in range(4)} == {0: 0, 1: STEPS, 2: 3 * STEPS, 3: 3 * STEPS}


def test_a_rollout_larger_than_the_buffer_keeps_its_last_trajectories() -> None:
    buffer = ReplayBuffer(2, STEPS, SHAPE)
    fill(buffer, 5, 0.0)
    rewards = buffer.transitions(torch.arange(2), torch.zeros(2, dtype=torch.long), "cpu").reward
    assert sorted(rewards.tolist()) == pytest.approx([0.03, 0.04])


def test_a_pass_visits_every_step_once_in_another_order_each_time() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    fill(buffer, 4, 0.0)
    batches = list(itertools.islice(buffer.batches(4, torch.Generator().manual_seed(3)), 10))
    first, second = ([tuple(pair) for slots, steps in part for pair in zip(slots.tolist(), steps.tolist(), strict=True)]
                     for part in (batches[:5], batches[5:]))  # fmt: skip
    assert sorted(first) == sorted(second) == list(itertools.product(range(4), range(STEPS)))
    assert first != second


def test_the_last_steps_can_be_left_out() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    fill(buffer, 4, 0.0)
    _, steps = next(buffer.batches(12, torch.Generator(), last_step=3))
    assert torch.bincount(steps).tolist() == [4, 4, 4]


def test_age_counts_rollouts_and_latest_only_keeps_to_the_last() -> None:
    buffer = ReplayBuffer(6, STEPS, SHAPE)
    fill(buffer, 2, 0.0)
    fill(buffer, 2, 1.0)
    ages = buffer.transitions(torch.arange(4), torch.zeros(4, dtype=torch.long), "cpu").age
    assert ages.tolist() == [1, 1, 0, 0]
    slots, _ = next(buffer.batches(2 * STEPS, torch.Generator(), latest_only=True))
    assert set(slots.tolist()) == {2, 3}


def test_the_state_survives_saving_and_the_ring_goes_on_at_the_same_place() -> None:
    buffer, copy = ReplayBuffer(5, STEPS, SHAPE), ReplayBuffer(5, STEPS, SHAPE)
    fill(buffer, 3, 0.0)
    fill(buffer, 3, 1.0)
    copy.load_state_dict(buffer.state_dict())
    torch.manual_seed(0)
    fill(buffer, 2, 2.0)
    torch.manual_seed(0)
    fill(copy, 2, 2.0)
    for name in ("latents", "log_probs", "facts", "prompt_ids", "born"):
        assert torch.equal(getattr(buffer, name), getattr(copy, name))
    assert (buffer.size, buffer.cursor, buffer.rollouts) == (copy.size, copy.cursor, copy.rollouts)


def test_a_state_of_another_shape_is_refused() -> None:
    buffer = ReplayBuffer(5, STEPS, SHAPE)
    fill(buffer, 3, 0.0)
    with pytest.raises(ValueError, match="resume with the same buffer_size"):
        ReplayBuffer(5, STEPS + 1, SHAPE).load_state_dict(buffer.state_dict())


def test_an_empty_buffer_says_so() -> None:
    with pytest.raises(ValueError, match="sample a rollout first"):
        next(ReplayBuffer(2, STEPS, SHAPE).batches(1, torch.Generator()))
    with pytest.raises(ValueError, match="raise buffer_size"):
        ReplayBuffer(0, STEPS, SHAPE)
