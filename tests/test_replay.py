from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from dblightning.replay import TENSORS, ReplayBuffer
from dblightning.rollout import Trajectory

STEPS, SHAPE = 5, (2, 3, 3)


def fill(buffer: ReplayBuffer, batch: int, tag: float) -> Trajectory:
    """Add a rollout whose reward names it: ``tag`` + image index / 100."""
    trajectory = Trajectory(torch.randn(STEPS + 1, batch, *SHAPE), torch.randn(STEPS, batch))
    reward = tag + torch.arange(batch) / 100
    buffer.add(trajectory, torch.arange(batch), reward, reward - 1, reward + 1)
    return trajectory


def seed(lane: int, visit: int) -> int:
    return 1_000 * lane + visit


def everything(buffer: ReplayBuffer) -> torch.Tensor:
    """Steps in one whole pass, by (slot, step)."""
    slots, steps = next(buffer.batches(buffer.size * STEPS, seed))
    return torch.stack([slots, steps])


def drawn(buffer: ReplayBuffer, count: int, batches: int, rank: int = 0) -> list[list[tuple[float, int]]]:
    """The first batches, each step known by (reward, step)."""
    indices = itertools.islice(buffer.batches(count, seed, rank=rank), batches)
    return [
        list(zip(buffer.transitions(slots, steps, "cpu").reward.tolist(), steps.tolist(), strict=True))
        for slots, steps in indices
    ]


def test_a_transition_is_what_was_rolled_out() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    trajectory = fill(buffer, 3, 1.0)
    got = buffer.transitions(torch.tensor([2, 0]), torch.tensor([4, 1]), "cpu")
    assert torch.equal(got.latents, torch.stack([trajectory.latents[4, 2], trajectory.latents[1, 0]]))
    assert torch.equal(got.next_latents, torch.stack([trajectory.latents[5, 2], trajectory.latents[2, 0]]))
    assert torch.equal(got.log_prob, torch.stack([trajectory.log_probs[4, 2], trajectory.log_probs[1, 0]]))
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
    batches = drawn(buffer, 4, 10)
    first, second = (list(itertools.chain(*part)) for part in (batches[:5], batches[5:]))
    assert sorted(first) == sorted(second) == sorted(everything_of(buffer))
    assert first != second


def everything_of(buffer: ReplayBuffer) -> list[tuple[float, int]]:
    slots, steps = everything(buffer)
    return list(zip(buffer.transitions(slots, steps, "cpu").reward.tolist(), steps.tolist(), strict=True))


@pytest.mark.parametrize("count", [3, 6, 7, 20, 30])
def test_every_step_is_drawn_equally_often_whatever_the_batch_size(count: int) -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    fill(buffer, 4, 0.0)
    total = 4 * STEPS
    batches = drawn(buffer, count, total // math.gcd(total, count))  # as many as make whole passes
    times = Counter(itertools.chain(*batches))
    assert set(times.values()) == {count // math.gcd(total, count)}
    assert len(times) == total


def test_a_batch_takes_one_step_of_each_lane() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    fill(buffer, 4, 0.0)
    for batch in drawn(buffer, 4, 12):
        assert [reward for reward, _ in batch] == pytest.approx([0.0, 0.01, 0.02, 0.03])
    steps = [tuple(step for _, step in batch) for batch in drawn(buffer, 4, 5)]
    assert any(len(set(each)) > 1 for each in steps)  # each lane in an order of its own


@pytest.mark.parametrize(("count", "capacity"), [(2, 3), (3, 6), (4, 6), (7, 6), (15, 6)])
def test_ranks_together_draw_what_one_process_would(count: int, capacity: int) -> None:
    """Two buffers of three trajectories a rollout against one of six; the second case holds two rollouts."""
    whole = ReplayBuffer(2 * capacity, STEPS, SHAPE)
    parts = [ReplayBuffer(capacity, STEPS, SHAPE) for _ in range(2)]
    for tag in range(3):
        trajectory, rewards = Trajectory(torch.randn(STEPS + 1, 6, *SHAPE), torch.randn(STEPS, 6)), tag + torch.rand(6)
        whole.add(trajectory, torch.arange(6), rewards, rewards, rewards)
        for rank, part in enumerate(parts):
            mine = slice(3 * rank, 3 * rank + 3)
            own = Trajectory(trajectory.latents[:, mine], trajectory.log_probs[:, mine])
            part.add(own, torch.arange(3), rewards[mine], rewards[mine], rewards[mine])
    ranks = [drawn(part, count, 9, rank) for rank, part in enumerate(parts)]
    assert drawn(whole, 2 * count, 9) == [one + other for one, other in zip(*ranks, strict=True)]


def test_the_last_steps_can_be_left_out() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    fill(buffer, 4, 0.0)
    _, steps = next(buffer.batches(12, seed, last_step=3))
    assert torch.bincount(steps).tolist() == [4, 4, 4]


def test_age_counts_rollouts_those_without_a_sample_too() -> None:
    buffer = ReplayBuffer(6, STEPS, SHAPE)
    fill(buffer, 2, 0.0)
    fill(buffer, 2, 1.0)
    fill(buffer, 0, 2.0)
    ages = buffer.transitions(torch.arange(4), torch.zeros(4, dtype=torch.long), "cpu").age
    assert ages.tolist() == [2, 2, 1, 1]


def test_a_cleared_buffer_holds_the_next_rollout_alone() -> None:
    buffer = ReplayBuffer(4, STEPS, SHAPE)
    fill(buffer, 4, 0.0)
    buffer.clear()
    fill(buffer, 3, 1.0)
    assert {math.floor(reward) for reward, _ in everything_of(buffer)} == {1}


def test_the_state_survives_saving_and_the_ring_goes_on_at_the_same_place() -> None:
    buffer, copy = ReplayBuffer(5, STEPS, SHAPE), ReplayBuffer(5, STEPS, SHAPE)
    fill(buffer, 3, 0.0)
    fill(buffer, 3, 1.0)
    copy.load_state_dict(buffer.state_dict())
    torch.manual_seed(0)
    fill(buffer, 2, 2.0)
    torch.manual_seed(0)
    fill(copy, 2, 2.0)
    for name in TENSORS:
        assert torch.equal(getattr(buffer, name), getattr(copy, name))
    assert (buffer.size, buffer.cursor, buffer.rollouts) == (copy.size, copy.cursor, copy.rollouts)


@pytest.mark.parametrize(("rollouts", "capacity"), [(1, 7), (1, 2), (1, 3), (3, 7), (3, 4), (3, 3), (3, 5)])
def test_a_state_loads_into_a_buffer_of_another_capacity_as_its_latest_trajectories(
    rollouts: int, capacity: int
) -> None:
    buffer, other = ReplayBuffer(5, STEPS, SHAPE), ReplayBuffer(capacity, STEPS, SHAPE)
    for tag in range(rollouts):
        fill(buffer, 3, float(tag))
    other.load_state_dict(buffer.state_dict())
    # reward = rollout + image / 100: the latest are the largest
    latest = sorted(reward for reward, _ in everything_of(buffer))[::STEPS][-capacity:]
    assert sorted(reward for reward, _ in everything_of(other))[::STEPS] == latest
    fill(other, 1, 9.0)  # and the next pushes out the oldest
    latest = [*latest, 9.0][-capacity:]
    assert sorted(reward for reward, _ in everything_of(other))[::STEPS] == latest


def test_a_state_without_contents_keeps_the_count_of_rollouts_alone() -> None:
    buffer, copy = ReplayBuffer(5, STEPS, SHAPE), ReplayBuffer(5, STEPS, SHAPE)
    fill(buffer, 3, 0.0)
    state = buffer.state_dict(contents=False)
    assert all(state[name].numel() == 0 for name in TENSORS)
    copy.load_state_dict(state)
    assert (copy.size, copy.cursor, copy.rollouts) == (0, 0, 1)


def test_a_state_of_another_shape_is_refused() -> None:
    buffer = ReplayBuffer(5, STEPS, SHAPE)
    fill(buffer, 3, 0.0)
    with pytest.raises(ValueError, match="resume with the same steps"):
        ReplayBuffer(5, STEPS + 1, SHAPE).load_state_dict(buffer.state_dict())


def test_an_empty_buffer_has_no_batches() -> None:
    assert not list(ReplayBuffer(2, STEPS, SHAPE).batches(1, seed))


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="raise buffer_size"):
        ReplayBuffer(0, STEPS, SHAPE)
