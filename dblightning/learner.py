"""One adapter in training, and all that is its own: reward, objective, KL term, statistics, value function, replay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dblightning.objectives.advantages import PromptStatistics, advantages
from dblightning.objectives.base import Objective
from dblightning.objectives.kl import KLTerm
from dblightning.objectives.old_policy import OldPolicy
from dblightning.objectives.per_reward import Judged, per_reward_advantages
from dblightning.objectives.value import ValueFunction
from dblightning.replay import ReplayBuffer, Transitions
from dblightning.rewards.base import RewardMetric
from dblightning.rollout import Trajectory
from dblightning.settings import check
from dblightning.training_rules import parts_problem
from dblightning.training_settings import TrainingSettings

#: vectors of prompts, (B, P), by their ids, int64 (B,)
Texts = Callable[[Tensor], Tensor]


class Learner(nn.Module):
    """An adapter that learns from its reward. A run has one, or one per reward of a basis.

    Args:
        name: the adapter's.
        reward: what it learns from.
        objective: of its updates.
        settings: the run's, with its own values where it has them.
        value_function: of its reward.
        seed: of the run, which draws KL rows.
        texts: vectors of prompts, for the value function.
        old: the policy that samples its rollouts, where that is not the one in training.
        place: among the adapters in training.
        alone: whether it is the only one; else what is logged about it ends in its name.
    """

    def __init__(
        self,
        name: str,
        reward: RewardMetric,
        objective: Objective,
        settings: TrainingSettings,
        value_function: ValueFunction,
        seed: int,
        texts: Texts,
        old: OldPolicy,
        place: int = 0,
        alone: bool = True,
    ) -> None:
        super().__init__()
        if settings.advantage.per_reward:
            for problem in parts_problem(type(reward).__name__, len(reward.part_names)):
                raise ValueError(problem)
        self.name = name
        self.place = place
        self.suffix = "" if alone else f"/{name}"
        self.reward = reward
        self.objective = objective
        self.settings = settings
        self.kl = KLTerm(settings.kl, seed)
        self.statistics = PromptStatistics.of(settings.advantage)
        self.value_function = value_function
        self.texts = texts
        self.old = old
        self.replay: ReplayBuffer | None = None
        self.most_held = 0  # trajectories, by the rank that holds most
        self.share = 1.0  # of this rank's gradient: its stored steps by the ranks' mean
        self.latest_images: tuple[Tensor, list[str], Tensor] | None = None  # of the last rollout, for callbacks

    def tag(self, name: str) -> str:
        """What a value is logged as: ``train/kl``, or ``train/kl/<adapter>`` where there are several."""
        return f"{name}{self.suffix}"

    def own_settings(self) -> dict[str, Any]:
        """Its reward and what may be its own, plain: for the hyperparameters of a basis."""
        kl, optimisation = self.settings.kl, self.settings.optimisation
        return {
            "reward": self.reward.name,
            "learning_rate": optimisation.learning_rate,
            "clip_grad_norm": optimisation.clip_grad_norm,
            "kl_weight": kl.weight,
            "kl_target": kl.target,
            "init": self.settings.adapter.init,
            **{name: getattr(self.objective, name) for name in self.objective.per_adapter},
        }

    def rows(self, count: int) -> slice:
        """Its rows of a rollout of ``count`` images per adapter."""
        return slice(self.place * count, (self.place + 1) * count)

    # ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────────

    def judged(self, prompt_ids: Tensor, parts: Tensor, finite: Tensor) -> Judged | None:
        """Samples of all ranks by each part of the reward, where the advantage is per reward; None elsewhere.

        Args:
            prompt_ids: int64 (N,).
            parts: (N, parts).
            finite: which have a finite reward, bool (N,); the others get NaN.
        """
        if not self.settings.advantage.per_reward:
            return None
        reward: Any = self.reward
        named = dict(zip(reward.part_names, parts[finite].T, strict=False))
        deviation = self.settings.advantage.deviation
        return per_reward_advantages(prompt_ids[finite], named, reward.weights, deviation).among(finite)

    def chosen(self, prompt_ids: Tensor, rewards: Tensor, judged: Judged | None = None) -> Tensor:
        """Which of a rollout's samples of all ranks are trained on, bool (B,), besides a finite reward."""
        chosen = self.objective.kept(prompt_ids, rewards)
        if not self.settings.advantage.drop_flat_groups:
            return chosen
        return chosen & (self.statistics.varied(prompt_ids) if judged is None else judged.varied)

    def store(
        self,
        trajectory: Trajectory,
        prompt_ids: Tensor,
        reward: Tensor,
        kept: Tensor,
        num_steps: int,
        advantage: Tensor | None = None,
    ) -> None:
        """Put samples into the buffer, with their prompts' statistics.

        Args:
            trajectory: B of them.
            prompt_ids: int64 (B,), on the CPU.
            reward: (B,).
            kept: which of them, bool (B,), on the CPU.
            num_steps: stored steps of a trajectory.
            advantage: in place of the reward's own, (B,), on the CPU.
        """
        rows, kept = kept.nonzero().flatten(), kept.to(reward.device)
        scores = reward[kept]
        baseline, scale = self.statistics(prompt_ids[rows]) if len(rows) else (scores, scores)
        if advantage is not None:
            baseline, scale = scores - advantage[rows].to(scores), torch.ones_like(scores)
        buffer = self.buffer(len(reward), num_steps, trajectory.latents)
        if self.settings.replay.buffer_size is None:
            buffer.clear()
        buffer.add(trajectory.of(kept), prompt_ids[rows], scores, baseline.to(scores), scale.to(scores), rows)

    def buffer(self, batch_size: int, steps: int, latents: Tensor) -> ReplayBuffer:
        """The replay buffer, allocated at the first rollout, for trajectories like ``latents`` (…, C, h, w)."""
        size = self.settings.replay.buffer_size
        capacity = batch_size if size is None else size // steps
        check(
            capacity >= batch_size,
            f"a rollout has {batch_size} trajectories of {steps} steps, more than buffer_size {size} holds; "
            f"set buffer_size to at least {batch_size * steps}, or null to keep the latest rollout only",
        )
        if self.replay is None or (size is None and self.replay.capacity != capacity):
            return self.allocate(capacity, steps, latents.shape[-3:], latents.device)
        return self.replay

    def allocate(self, capacity: int, steps: int, latent_shape: Sequence[int], device: torch.device) -> ReplayBuffer:
        """A new replay buffer."""
        means = "mean" in self.objective.stores
        self.replay = ReplayBuffer(capacity, steps, latent_shape, device, means, self.settings.kl.to_go, self.place)
        return self.replay

    def held(self) -> tuple[int, list[int]]:
        """How many trajectories the buffer holds, and the prompts they are of."""
        if self.replay is None:
            return 0, []
        return self.replay.size, self.replay.prompt_ids[: self.replay.size].unique().tolist()

    # ── what it learns ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def uses_value(self) -> bool:
        """Whether the advantage has a value function."""
        return self.settings.advantage.baseline in ("value", "both")

    def value(self, transitions: Transitions) -> Tensor:
        """The value function's prediction, (B,)."""
        text = self.texts(transitions.prompt_id)
        step_index = transitions.step_index.to(transitions.latents.device, non_blocking=True)
        value: Tensor = self.value_function(transitions.latents, text.float(), step_index)
        return value

    @torch.no_grad()
    def advantages(self, transitions: Transitions, rollout: int) -> Tensor:
        """Advantage of each transition, (B,), after so many rollouts."""
        settings, alpha = self.settings.advantage, self.kl.weight_at(rollout) / self.settings.optimisation.reward_weight
        with torch.autocast(transitions.latents.device.type, enabled=False):
            value = self.value(transitions) if self.uses_value else None
        return advantages(transitions, settings.baseline, value, settings.normalize, settings.clip, alpha)

    # ── an update that fails ─────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> dict[str, Any]:
        """A copy of what an update changes beside weights; the replay buffer takes back its own."""
        return {
            "statistics": copy.deepcopy(self.statistics),
            "replay": None if self.replay is None else self.replay.rollouts,
            "kl_weight": self.kl.weight,
            "objective": copy.deepcopy(self.objective.state_dict()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a :meth:`snapshot`."""
        self.statistics, self.kl.weight = state["statistics"], state["kl_weight"]
        self.objective.load_state_dict(state["objective"])
        if state["replay"] is None:
            self.replay = None
        elif self.replay is not None and self.replay.rollouts > state["replay"]:
            self.replay.take_back()


#: a micro-batch of one adapter
Part = tuple[Learner, Transitions]
#: the micro-batches of several
Batches = Sequence[tuple[Learner, Iterator[Transitions]]]


def next_parts(batches: Batches) -> list[Part]:
    """The next micro-batch of each learner that has one."""
    return [(learner, part) for learner, each in batches for part in islice(each, 1)]


def side_by_side(batches: Batches) -> Iterator[list[Part]]:
    """Micro-batches that learners run together, until none has any left."""
    while parts := next_parts(batches):
        yield parts


def by_adapter(learners: Sequence[Learner], value: Callable[[Learner], Any]) -> Any:
    """What a run keeps of its adapters: the value itself of an only one, else name → value."""
    if len(learners) == 1:
        return value(learners[0])
    return {learner.name: value(learner) for learner in learners}


def of_adapter(learners: Sequence[Learner], learner: Learner, kept: Any) -> Any:
    """One adapter's value in what :func:`by_adapter` made."""
    return kept if len(learners) == 1 else kept[learner.name]
