"""Which prompts come when: the endless training stream and the finite evaluation pass, as arithmetic on positions.

Everything is a function of (seed, rank, world size, position), so the only state is one number: how many prompts all
ranks together have drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

#: (index of the prompt in its list, seed index)
Key = tuple[int, int]
Batch = dict[str, Any]

RESERVED = ("prompt", "prompt_id", "seed")


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what is known about each.

    Args:
        prompts: n strings.
        metadata: column name → n values, one per prompt.
        ids: each prompt's id, its place in the list it was taken from; None numbers them from 0.

    Raises:
        ValueError: no prompt, a column of another length, or one named like a batch's own entries.
    """

    prompts: list[str]
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a prompt set needs at least one prompt, got none")
        for name, column in self.metadata.items():
            if name in RESERVED:
                raise ValueError(
                    f"metadata column {name!r} clashes with the batch's own {', '.join(RESERVED)}; rename it"
                )
            if len(column) != len(self.prompts):
                raise ValueError(f"metadata column {name!r} has {len(column)} values for {len(self.prompts)} prompts")
        if self.ids is not None and len(set(self.ids)) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need as many different ids, got {len(set(self.ids))}")

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The prompts' ids, in their order."""
        return list(range(len(self.prompts)) if self.ids is None else self.ids)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {prompt_id: place for place, prompt_id in enumerate(self.prompt_ids)}

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, indices: Sequence[int]) -> PromptSet:
        """The prompts at these indices, numbered anew from 0."""
        columns = {name: [column[i] for i in indices] for name, column in self.metadata.items()}
        return PromptSet([self.prompts[i] for i in indices], columns)

    def subset(self, indices: Sequence[int]) -> PromptSet:
        """The prompts at these indices, with the ids they have."""
        return replace(self.select(indices), ids=[self.prompt_ids[i] for i in indices])

    def without(self, texts: Collection[str]) -> list[int]:
        """Indices of the prompts that are none of ``texts``."""
        known = set(texts)
        return [index for index, prompt in enumerate(self.prompts) if prompt not in known]

    def batch(self, keys: Sequence[Key]) -> Batch:
        """The batch of B (prompt, seed) pairs.

        Returns:
            {"prompt_id": int64 (B,), "seed": int64 (B,), "prompt": B strings, and B values per metadata column}.
        """
        places = [self._places[prompt_id] for prompt_id, _ in keys]
        return {
            "prompt_id": torch.tensor([prompt_id for prompt_id, _ in keys], dtype=torch.long),
            "seed": torch.tensor([seed for _, seed in keys], dtype=torch.long),
            "prompt": [self.prompts[i] for i in places],
            **{name: [column[i] for i in places] for name, column in self.metadata.items()},
        }


def sample_order(strata: Sequence[Hashable], seed: int) -> list[int]:
    """All n indices in a random order whose every beginning is a stratified sample.

    Among the first k, a stratum of share p has p · k members, give or take one per stratum: its shuffled members are
    laid out evenly over the order. So a longer beginning holds the shorter one, and any of them has the set's mix.

    Args:
        strata: what each item is grouped by, n values; all equal give a plain shuffle.
        seed: of the order, ≥ 0.
    """
    rng = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, stratum in enumerate(strata):
        members[stratum].append(index)
    places = np.empty(len(strata))
    for group in members.values():
        # one shift per stratum, so that strata of one size take turns in random order
        places[rng.permutation(group)] = (np.arange(len(group)) + rng.random()) / len(group)
    return [int(index) for index in np.argsort(places, kind="stable")]


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class PromptSampler:
    """Draws a rank's share of each rollout batch from one global order.

    The order goes through all prompts, shuffled anew each time round. A step takes the next ``world_size`` ·
    ``prompts_per_rank`` prompts and gives each rank its own run of them, so that the ranks' batches laid end to end are
    the batch one process with ``world_size`` times the batch size would draw. The seed index counts a prompt's uses:
    a (prompt, seed) pair never comes twice.

    Args:
        num_prompts: n ≥ 1.
        batch_size: images per rank and step, a multiple of ``samples_per_prompt``.
        samples_per_prompt: images of one prompt that sit side by side in a batch, each with its own seed index.
        seed: of the shuffling, ≥ 0.
        rank, world_size: this process among all.
        repeat_after: prompts drawn by all ranks, a number of steps' worth, after which the same ones come again with
            new seed indices; None never repeats (``overfit_batches``).

    Raises:
        ValueError: a number out of its range.
    """

    num_prompts: int
    batch_size: int
    samples_per_prompt: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeat_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "batch_size", "samples_per_prompt", "world_size"):
            check_positive(name, getattr(self, name))
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size must be a multiple of samples_per_prompt ({self.samples_per_prompt}), "
                f"got {self.batch_size}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        check_rank(self.rank, self.world_size)

    @property
    def prompts_per_rank(self) -> int:
        """Prompts in one batch of one rank."""
        return self.batch_size // self.samples_per_prompt

    @property
    def prompts_per_step(self) -> int:
        """Prompts that all ranks together draw in one step."""
        return self.prompts_per_rank * self.world_size

    def keys(self, position: int) -> list[Key]:
        """This rank's (prompt, seed) pairs of the step that starts after ``position`` prompts have been drawn."""
        first = position + self.rank * self.prompts_per_rank
        keys: list[Key] = []
        for draw in range(first, first + self.prompts_per_rank):
            visit = 0
            if self.repeat_after is not None:
                visit, draw = divmod(draw, self.repeat_after)
            epoch, place = divmod(draw, self.num_prompts)
            prompt_id = int(_shuffled(self.num_prompts, self.seed, epoch)[place])
            if self.repeat_after is not None:
                epoch += visit * -(-self.repeat_after // self.num_prompts)  # beyond the seeds of earlier visits
            keys += [(prompt_id, epoch * self.samples_per_prompt + sample) for sample in range(self.samples_per_prompt)]
        return keys


def evaluation_keys(num_prompts: int, seeds: int, rank: int = 0, world_size: int = 1) -> list[Key]:
    """A rank's share of all (prompt, seed) pairs: every ``world_size``-th of them, a prompt's seeds side by side.

    No pair is left out and none is given twice to make shares even: they may differ by one, or be empty.
    """
    check_positive("eval_seeds", seeds)
    check_rank(rank, world_size)
    return [divmod(item, seeds) for item in range(rank, num_prompts * seeds, world_size)]


def check_positive(name: str, value: int) -> None:
    """Refuse what is not an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank outside [0, world_size)."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")


@dataclass
class Cursor:
    """Position of the training stream."""

    #: prompts that all ranks have drawn since the run began
    position: int = 0
    #: batches this process has handed out since it began or resumed
    handed_out: int = 0

    def resume(self, position: int) -> None:
        """Resume from a saved position."""
        self.position, self.handed_out = position, 0


# Both loaders below are plain iterables and no torch DataLoaders. Prompts lie in memory, so a worker process would have
# nothing to do, and Lightning leaves an iterable's sharding alone whatever Trainer(use_distributed_sampler) says.


class TrainLoader:
    """The training stream, in epochs of ``num_batches``; each pass continues where the last one stopped.

    A batch counts as drawn when it is handed out. ``in_flight`` says how many of those are not worked off yet: a
    checkpoint written in the middle of one repeats it.
    """

    def __init__(
        self,
        prompts: PromptSet,
        sampler: PromptSampler,
        num_batches: int,
        cursor: Cursor | None = None,
        in_flight: Callable[[], int] = lambda: 0,
    ) -> None:
        self.prompts = prompts
        self.sampler = sampler
        self.num_batches = num_batches
        self.cursor = Cursor() if cursor is None else cursor
        self._in_flight = in_flight

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.num_batches):
            keys = self.sampler.keys(self.cursor.position)
            self.cursor.position += self.sampler.prompts_per_step
            self.cursor.handed_out += 1
            yield self.prompts.batch(keys)

    def state_dict(self) -> dict[str, int]:
        """The position, for Lightning: a loader with a state may be resumed in the middle of an epoch."""
        unfinished = min(self._in_flight(), self.cursor.handed_out)
        return {"position": self.cursor.position - unfinished * self.sampler.prompts_per_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved position."""
        self.cursor.resume(state["position"])


class EvalLoader:
    """A rank's share of the (prompt, seed) pairs, in order; the last batch may be short."""

    def __init__(self, prompts: PromptSet, batch_size: int, seeds: int = 1, rank: int = 0, world_size: int = 1) -> None:
        check_positive("eval_batch_size", batch_size)
        self.prompts = prompts
        self.batch_size = batch_size
        ids = prompts.prompt_ids
        self.keys = [(ids[index], each) for index, each in evaluation_keys(len(prompts), seeds, rank, world_size)]

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.keys), self.batch_size):
            yield self.prompts.batch(self.keys[start : start + self.batch_size])
