"""Replay buffer of whole trajectories: preallocated, equal numbers of every timestep, prompts kept as an index."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dblightning.rollout import Trajectory

#: in place of what transitions do not have
ABSENT = torch.empty(0)
NO_ADVANTAGE = ABSENT
TENSORS = ("latents", "log_probs", "facts", "prompt_ids", "born", "rows", "starts")


class Transitions(NamedTuple):
    """N single steps x_t → x_{t−1} drawn from the buffer."""

    latents: Tensor  # (N, C, h, w) float32
    next_latents: Tensor  # (N, C, h, w) float32, exactly what was sampled
    step_index: Tensor  # (N,) int64, in the solver's schedule; on the CPU: what it looks up is there
    log_prob: Tensor  # (N,) of the policy that sampled it; mean over C, h, w
    reward: Tensor  # (N,) of the trajectory's image
    baseline: Tensor  # (N,) its prompt's mean reward when it was sampled
    scale: Tensor  # (N,) its prompt's reward standard deviation when it was sampled
    prompt_id: Tensor  # (N,) int64, on the CPU
    age: Tensor  # (N,) int64, rollouts since it was sampled (0: the latest)
    advantage: Tensor = ABSENT  # (N,), filled in for an objective's loss
    mean: Tensor = ABSENT  # (N, C, h, w) of the step under the policy that sampled it, where it is stored
    kl_to_go: Tensor = ABSENT  # (N,) nats, KL of the trajectory's later steps less its mean, where it is stored
    adapter: Tensor = ABSENT  # int64 (N,), on the CPU: place of the adapter that sampled it; absent: the run's only one

    def at(self, rows: Tensor) -> Transitions:
        """Some of them: ``rows`` is int64 (n,)."""
        parts = {name: part[rows.to(part.device)] for name, part in self._asdict().items() if part is not ABSENT}
        return Transitions(**parts)

    @classmethod
    def joined(cls, parts: Sequence[Transitions]) -> Transitions:
        """All of them, one after the other."""
        if len(parts) == 1:
            return parts[0]
        present = [name for name, part in parts[0]._asdict().items() if part is not ABSENT]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in present})


class ReplayBuffer:
    """Ring of the latest trajectories.

    A trajectory is evicted whole, so every timestep is held equally often. Memory is taken once: about
    4 · capacity · (T + 1) · C·h·w bytes.

    Args:
        capacity: number of trajectories.
        num_steps: stored steps T of each: all denoising steps, or a window of them.
        latent_shape: (C, h, w).
        device: where the latents are kept.
        keep_means: store each step's mean too, about as much memory again.
        keep_kl_to_go: store each step's KL to go too.
        adapter: place, among the adapters in training, of the one whose trajectories these are.
    """

    means: Tensor

    def __init__(
        self,
        capacity: int,
        num_steps: int,
        latent_shape: Sequence[int],
        device: torch.device | str = "cpu",
        keep_means: bool = False,
        keep_kl_to_go: bool = False,
        adapter: int = 0,
    ) -> None:
        if capacity < 1:
            raise ValueError(
                f"the replay buffer must hold at least one trajectory of {num_steps} steps, got room for {capacity}; "
                "raise buffer_size, which counts single steps"
            )
        self.capacity = capacity
        self.num_steps = num_steps
        self.adapter = adapter
        self.latents = torch.zeros(capacity, num_steps + 1, *latent_shape, device=device)
        self.log_probs = torch.zeros(capacity, num_steps, device=device)
        self.facts = torch.zeros(capacity, 3, device=device)  # reward, baseline, scale
        self.prompt_ids = torch.zeros(capacity, dtype=torch.long)
        self.born = torch.zeros(capacity, dtype=torch.long)
        self.rows = torch.zeros(capacity, dtype=torch.long)
        self.starts = torch.zeros(capacity, dtype=torch.long)  # index of its first stored step in the solver's schedule
        wanted = {"means": keep_means, "kl_to_go": keep_kl_to_go}
        self.tensors = (*TENSORS, *(name for name, kept in wanted.items() if kept))
        if keep_kl_to_go:
            self.kl_to_go = torch.zeros(capacity, num_steps, device=device)
        if keep_means:
            self.means = torch.zeros(capacity, num_steps, *latent_shape, device=device)
        self.size = 0  # trajectories held
        self.cursor = 0  # where the next one goes
        self.rollouts = 0  # calls of add
        self._overwritten: dict[str, Any] | None = None  # by the latest add

    def add(
        self,
        trajectory: Trajectory,
        prompt_ids: Tensor,
        reward: Tensor,
        baseline: Tensor,
        scale: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        """Store a rollout; trajectories beyond the capacity push out the oldest.

        Args:
            trajectory: B trajectories, B >= 0.
            prompt_ids, reward, baseline, scale: each (B,).
            rows: place of each in the rollout's batch, int64 (B,); None: 0 … B−1.
        """
        rows = torch.arange(len(reward)) if rows is None else rows
        before = {"size": self.size, "cursor": self.cursor, "rollouts": self.rollouts}
        self.rollouts += 1
        latents = trajectory.latents.transpose(0, 1)
        facts = torch.stack([reward, baseline, scale], dim=1)
        keep = slice(max(0, len(reward) - self.capacity), None)
        slots = (self.cursor + torch.arange(len(reward))[: self.capacity]) % self.capacity
        at = slots.to(self.latents.device)
        kept = {name: getattr(self, name)[at.to(getattr(self, name).device)] for name in self.tensors if before["size"]}
        self._overwritten = {**before, "slots": at, "tensors": kept}
        self.latents[at] = latents[keep].to(self.latents)
        self.log_probs[at] = trajectory.log_probs.T[keep].to(self.log_probs)
        if trajectory.means is not None and "means" in self.tensors:
            self.means[at] = trajectory.means.transpose(0, 1)[keep].to(self.means)
        if trajectory.kl_to_go is not None and "kl_to_go" in self.tensors:
            self.kl_to_go[at] = trajectory.kl_to_go.T[keep].to(self.kl_to_go)
        self.facts[at] = facts[keep].to(self.facts)
        self.prompt_ids[slots] = prompt_ids[keep].cpu()
        self.born[slots] = self.rollouts
        self.rows[slots] = rows[keep].cpu()
        self.starts[slots] = trajectory.start
        self.cursor = (self.cursor + len(slots)) % self.capacity
        self.size = min(self.size + len(slots), self.capacity)

    def transitions(self, trajectory: Tensor, step_index: Tensor, device: torch.device | str) -> Transitions:
        """Gather steps by slot and stored step, both int64 (N,) on the CPU; nothing is read back from a device.

        The transitions' ``step_index`` is the one in the solver's schedule.
        """
        rows, steps = (index.to(self.latents.device, non_blocking=True) for index in (trajectory, step_index))
        reward, baseline, scale = self.facts[rows].T
        gathered = {
            "latents": self.latents[rows, steps],
            "next_latents": self.latents[rows, steps + 1],
            "log_prob": self.log_probs[rows, steps],
            "reward": reward,
            "baseline": baseline,
            "scale": scale,
            "age": self.rollouts - self.born[trajectory],
        }
        if "means" in self.tensors:
            gathered["mean"] = self.means[rows, steps]
        if "kl_to_go" in self.tensors:
            gathered["kl_to_go"] = self.kl_to_go[rows, steps]
        moved = {name: part.to(device, non_blocking=True) for name, part in gathered.items()}
        step_index = step_index + self.starts[trajectory]
        adapter = torch.full_like(trajectory, self.adapter)
        return Transitions(step_index=step_index, prompt_id=self.prompt_ids[trajectory], adapter=adapter, **moved)

    def take_back(self) -> None:
        """Undo the latest :meth:`add`: what it overwrote is there again. An update that failed is none.

        Raises:
            RuntimeError: there is no add to undo.
        """
        if self._overwritten is None:
            raise RuntimeError("nothing to take back: no rollout was added since the last time")
        for name, tensor in self._overwritten["tensors"].items():
            own = getattr(self, name)
            own[self._overwritten["slots"].to(own.device)] = tensor
        self.size, self.cursor = self._overwritten["size"], self._overwritten["cursor"]
        self.rollouts, self._overwritten = self._overwritten["rollouts"], None

    def clear(self) -> None:
        """Forget every trajectory."""
        self.size = self.cursor = 0

    def batches(
        self,
        count: int,
        seed: Callable[[int, int], int],
        last_step: int | None = None,
        rank: int = 0,
        first_step: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random (trajectory, step_index) index batches, each int64 (count,); none from an empty buffer.

        The stored steps, in order of batch row, rollout and step, are cut into ``count`` lanes of equal length. A batch
        takes one step of each lane, and a lane goes through its steps in random order before it begins again. (Where
        ``count`` does not divide the number of steps, a step on the border belongs to two lanes in parts.)

        So every step is drawn equally often, and the order of a lane depends on its number among all ranks' lanes
        alone: the batches of W ranks laid end to end are the batch one process with W times as many trajectories and
        ``count`` would draw, without a word between the ranks. That holds while the buffer holds whole rollouts.

        Args:
            count: indices per batch.
            seed: generator seed of (lane, pass); a lane is numbered over all ranks.
            last_step: only steps below it (training without the last ones).
            rank: whose lanes these are.
            first_step: only steps from it on (objectives that need the final samples alone).
        """
        steps = (last_step if last_step is not None else self.num_steps) - first_step
        total = self.size * steps
        if total == 0:
            return
        slots = torch.arange(self.size)
        slots = slots[np.lexsort((self.born[slots], self.rows[slots]))]
        # a lane is total / count steps long: in units of 1 / parts steps, that is `length`, a whole number
        parts = count // math.gcd(total, count)
        length = total * parts // count
        starts = torch.arange(count) * length
        generator = torch.Generator()
        for visit in itertools.count():
            if length == 1:
                order = torch.zeros(count, 1, dtype=torch.long)
            else:
                seeds = [seed(rank * count + lane, visit) for lane in range(count)]
                order = torch.stack([torch.randperm(length, generator=generator.manual_seed(each)) for each in seeds])
            for column in order.T:
                picked = (starts + column) // parts
                yield slots[picked // steps], picked % steps + first_step

    def epoch(
        self,
        count: int,
        seed: Callable[[int], int],
        last_step: int | None = None,
        rank: int = 0,
        first_step: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass: every stored step exactly once, in random (trajectory, step_index) batches of at most ``count``.

        The lanes are those of :meth:`batches`, but for whole steps: where ``count`` does not divide the number of
        steps, some lanes are one step longer and the last batch is smaller.

        Args:
            count, last_step, rank, first_step: see :meth:`batches`.
            seed: generator seed of a lane, numbered over all ranks.
        """
        steps = (last_step if last_step is not None else self.num_steps) - first_step
        total = self.size * steps
        slots = torch.arange(self.size)
        slots = slots[np.lexsort((self.born[slots], self.rows[slots]))]
        generator = torch.Generator()
        ends = [lane * total // count for lane in range(count + 1)]
        lanes = []
        for lane, (start, end) in enumerate(itertools.pairwise(ends)):
            generator.manual_seed(seed(rank * count + lane))
            lanes.append(start + torch.randperm(end - start, generator=generator))
        for column in range(-(-total // count)):
            picked = torch.stack([lane[column] for lane in lanes if column < len(lane)])
            yield slots[picked // steps], picked % steps + first_step

    def state_dict(self, contents: bool = True) -> dict[str, Any]:
        """Everything, for the checkpoint; only the trajectories held are stored.

        Args:
            contents: False stores none, for a buffer that is cleared before it is used again.
        """
        size, cursor = (self.size, self.cursor) if contents else (0, 0)
        held = {name: getattr(self, name)[:size].cpu().clone() for name in self.tensors}
        return {**held, "size": size, "cursor": cursor, "rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`; of a buffer of another capacity the latest trajectories that have room here.

        Raises:
            ValueError: trajectories of another shape, or without the means that are stored here.
        """
        for name, what, who in (
            ("means", "means", "objective needs them"),
            ("kl_to_go", "KL to go", "kl.to_go needs it"),
        ):
            if name in self.tensors and name not in state and state["size"] > 0:
                raise ValueError(
                    f"the checkpoint's replay buffer holds no {what} of its steps, and this run's {who}; "
                    "resume with the settings that it was trained with, or start a new run from its exported adapter"
                )
        if state["latents"].shape[1:] != self.latents.shape[1:]:
            raise ValueError(
                f"the checkpoint's replay buffer holds trajectories of shape {tuple(state['latents'].shape[1:])}, this "
                f"run's are {tuple(self.latents.shape[1:])}; resume with the same steps and resolution"
            )
        size = state["size"]
        if size == self.capacity:
            slots, cursor = torch.arange(size), state["cursor"] % self.capacity
        else:
            # from the oldest on: a full ring's cursor stands on it, another's behind the newest
            slots = (state["cursor"] + torch.arange(size))[-self.capacity :] % max(size, 1)
            cursor = len(slots) % self.capacity
        for name in self.tensors:
            own = getattr(self, name)
            if name in state and size > 0:  # "starts" is not in checkpoints of before windows
                own[: len(slots)] = state[name][slots].to(own.device)
        self.size, self.cursor, self.rollouts = len(slots), cursor, state["rollouts"]
