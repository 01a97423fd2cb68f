"""The training stream and the evaluation shares, against what they promise, by counting."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dblightning.data.stream import EvalLoader, PromptSampler, PromptSet, TrainLoader, evaluation_keys, sample_order


def batches_of(sampler: PromptSampler, steps: int, start: int = 0) -> list[list[tuple[int, int]]]:
    return [sampler.keys(start + step * sampler.prompts_per_step) for step in range(steps)]


def flat(batches: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return [key for batch in batches for key in batch]


def test_every_round_visits_every_prompt_once_in_another_order() -> None:
    ids = [prompt_id for prompt_id, _ in flat(batches_of(PromptSampler(num_prompts=25, batch_size=5), steps=15))]
    rounds = [ids[0:25], ids[25:50], ids[50:75]]
    assert all(sorted(order) == list(range(25)) for order in rounds)
    # chance of two equal shuffles of 25: 1 / 25!
    assert len(set(map(tuple, rounds))) == 3 and list(range(25)) not in rounds


@pytest.mark.parametrize("samples_per_prompt", [1, 2, 4])
def test_a_prompt_and_seed_pair_never_comes_twice_and_seeds_count_a_prompts_uses(samples_per_prompt: int) -> None:
    # 7 prompts and steps of 4·3 images: rounds end inside a batch
    sampler = PromptSampler(num_prompts=7, batch_size=12, samples_per_prompt=samples_per_prompt)
    keys = flat(batches_of(sampler, steps=20))
    assert len(set(keys)) == len(keys) == 240
    for prompt_id in range(7):
        seeds = [seed for i, seed in keys if i == prompt_id]
        assert seeds == list(range(len(seeds)))


def test_samples_of_a_prompt_sit_side_by_side() -> None:
    for batch in batches_of(PromptSampler(num_prompts=5, batch_size=6, samples_per_prompt=3), steps=4):
        assert batch[0][0] == batch[1][0] == batch[2][0] and batch[3][0] == batch[4][0] == batch[5][0]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("samples_per_prompt", [1, 2])
def test_ranks_laid_end_to_end_are_one_process_with_the_whole_batch(world_size: int, samples_per_prompt: int) -> None:
    ranks = [
        batches_of(PromptSampler(10, 4, samples_per_prompt, seed=3, rank=rank, world_size=world_size), steps=9)
        for rank in range(world_size)
    ]
    alone = batches_of(PromptSampler(10, 4 * world_size, samples_per_prompt, seed=3), steps=9)
    assert [[key for rank in ranks for key in rank[step]] for step in range(9)] == alone


def test_the_same_seed_gives_the_same_stream_and_another_seed_another() -> None:
    first, again, other = (flat(batches_of(PromptSampler(50, 10, seed=seed), steps=5)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_resumed_stream_goes_on_where_it_stopped() -> None:
    prompts, sampler = PromptSet([f"prompt {i}" for i in range(7)]), PromptSampler(num_prompts=7, batch_size=3)
    whole = [batch["prompt"] for batch in TrainLoader(prompts, sampler, num_batches=10)]

    stopped = TrainLoader(prompts, sampler, num_batches=4)
    iterator = iter(stopped)
    before = [next(iterator)["prompt"] for _ in range(4)]
    resumed = TrainLoader(prompts, sampler, num_batches=6)
    resumed.load_state_dict(stopped.state_dict())
    assert before + [batch["prompt"] for batch in resumed] == whole


def test_a_position_holds_across_batch_sizes_and_world_sizes() -> None:
    """Twelve prompts drawn by one process, then 2 ranks · 2 prompts follow: together still one round after another."""
    first = flat(batches_of(PromptSampler(8, 6), steps=2))
    ranks = [PromptSampler(8, 2, rank=rank, world_size=2) for rank in range(2)]
    then = [key for step in range(3) for sampler in ranks for key in sampler.keys(12 + 4 * step)]
    assert first + then == flat(batches_of(PromptSampler(8, 1), steps=24))


def test_a_batch_in_flight_is_not_counted_as_drawn() -> None:
    unfinished = 0
    prompts, sampler = PromptSet(["a", "b", "c", "d"]), PromptSampler(num_prompts=4, batch_size=2)
    loader = TrainLoader(prompts, sampler, num_batches=3, in_flight=lambda: unfinished)
    iterator = iter(loader)
    next(iterator)
    unfinished = 1
    assert loader.state_dict() == {"position": 0}
    unfinished = 0
    assert loader.state_dict() == {"position": 2}
    # right after a resume no batch of this process can be in flight, whatever the trainer's restored counters say
    loader.load_state_dict({"position": 6})
    unfinished = 1
    assert loader.state_dict() == {"position": 6}


@pytest.mark.parametrize(("prompts", "seeds", "world_size"), [(10, 1, 3), (7, 3, 4), (2, 1, 4), (5, 2, 1)])
def test_evaluation_shares_hold_every_pair_once_and_differ_by_at_most_one(
    prompts: int, seeds: int, world_size: int
) -> None:
    shares = [evaluation_keys(prompts, seeds, rank, world_size) for rank in range(world_size)]
    counts = Counter(key for share in shares for key in share)
    assert counts == Counter({(i, s): 1 for i in range(prompts) for s in range(seeds)})
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_evaluation_pass_ends_with_a_short_batch_and_repeats_itself() -> None:
    loader = EvalLoader(PromptSet(list("abcde"), {"tag": [0, 1, 2, 3, 4]}), batch_size=4, seeds=2, rank=1, world_size=2)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    # odd items of a0 a1 b0 b1 …: each prompt's second seed
    assert [batch["prompt"] for batch in batches] == [["a", "b", "c", "d"], ["e"]]
    assert [batch["tag"] for batch in batches] == [[0, 1, 2, 3], [4]]
    assert torch.equal(batches[0]["seed"], torch.ones(4, dtype=torch.long))
    assert torch.equal(batches[1]["prompt_id"], torch.tensor([4]))
    assert [batch["prompt"] for batch in loader] == [batch["prompt"] for batch in batches]


@pytest.mark.parametrize(("num_prompts", "steps"), [(7, 2), (3, 5), (5, 5)])
def test_a_repeated_stream_has_the_same_prompts_each_time_and_never_the_same_pair(num_prompts: int, steps: int) -> None:
    """Also where the repeated part holds some prompts several times."""
    endless = PromptSampler(num_prompts, batch_size=4, samples_per_prompt=2)
    repeated = PromptSampler(num_prompts, batch_size=4, samples_per_prompt=2, repeat_after=2 * steps)
    batches = batches_of(repeated, steps=3 * steps)
    assert batches[:steps] == batches_of(endless, steps)
    for visit in (1, 2):
        again = batches[visit * steps : (visit + 1) * steps]
        assert [[prompt for prompt, _ in batch] for batch in again] == [
            [prompt for prompt, _ in batch] for batch in batches[:steps]
        ]
    assert len(set(flat(batches))) == len(flat(batches))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 4.0}, "batch_size must be an integer >= 1, got 4.0"),
        ({"batch_size": 6, "samples_per_prompt": 4}, r"multiple of samples_per_prompt \(4\), got 6"),
        ({"batch_size": 6, "seed": -1}, "seed must be >= 0, got -1"),
        ({"batch_size": 6, "rank": 2, "world_size": 2}, r"rank must lie in \[0, 2\), got 2"),
    ],
)
def test_a_number_out_of_range_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSampler(num_prompts=5, **arguments)


def test_metadata_of_another_length_or_with_a_reserved_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'tag' has 1 values for 2 prompts"):
        PromptSet(["a", "b"], {"tag": [1]})
    with pytest.raises(ValueError, match="'seed' clashes"):
        PromptSet(["a"], {"seed": [1]})
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSet([])


def test_any_beginning_of_a_sample_order_has_the_mix_of_the_whole() -> None:
    strata = ["a"] * 30 + ["b"] * 90 + ["c"] * 3
    order = sample_order(strata, seed=1)
    assert sorted(order) == list(range(123))
    for count in range(1, 124):
        found = Counter(strata[index] for index in order[:count])
        for stratum, share in {"a": 30 / 123, "b": 90 / 123, "c": 3 / 123}.items():
            assert abs(found[stratum] - share * count) <= 2
    assert order != sample_order(strata, seed=2)
    firsts = [sample_order([None] * 10, seed)[0] for seed in range(2000)]
    # 2000 draws of one in ten: a standard deviation of 13.4, five of them
    assert all(abs(firsts.count(index) - 200) < 67 for index in range(10))


def test_a_subset_keeps_its_ids_and_a_selection_is_numbered_anew() -> None:
    prompts = PromptSet(list("abcde"), {"tag": [0, 1, 2, 3, 4]})
    subset = prompts.subset([1, 3, 4])
    assert subset.batch([(3, 7)]) == {
        "prompt_id": torch.tensor([3]),
        "seed": torch.tensor([7]),
        "prompt": ["d"],
        "tag": [3],
    }
    assert subset.subset([2]).prompt_ids == [4]
    assert subset.select([2]).prompt_ids == [0]
    assert [key for key in EvalLoader(subset, 2, seeds=2).keys] == [(i, s) for i in (1, 3, 4) for s in range(2)]
    with pytest.raises(ValueError, match="2 prompts need as many different ids, got 1"):
        PromptSet(["a", "b"], ids=[1, 1])
