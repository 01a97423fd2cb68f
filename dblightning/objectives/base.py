"""Interface of objectives: what one needs of a rollout, its loss, its state; and the policy it is given."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dblightning.replay import Transitions
from dblightning.schedule import GaussianStep
from dblightning.settings import check, check_settings
from dblightning.solvers import GaussianSolver
from dblightning.training_settings import TrainingSettings

#: what is logged about a loss: name → scalar
Metrics = dict[str, Tensor]
#: what an objective trains on: every step of the trajectories, their final samples, or the reward's gradient
Needs = Literal["trajectories", "samples", "gradients"]


class Policy(Protocol):
    """The denoiser as an objective sees it: model outputs for some transitions, each (B, C, h, w), guidance applied."""

    solver: GaussianSolver

    def current(self, transitions: Transitions) -> Tensor:
        """With the adapter in training, with gradients."""

    def step(self, transitions: Transitions) -> GaussianStep:
        """The denoising step that :meth:`current` makes, with gradients."""

    def reference(self, transitions: Transitions) -> Tensor:
        """Of the base model (all gates zero), without gradients."""

    def old(self, transitions: Transitions) -> Tensor:
        """With a frozen earlier adapter, without gradients."""


class Objective(ABC):
    """Base class of objectives: what an update of the policy minimises, beside the KL term.

    Its subclasses are named in ``model.objective`` by class path, with their settings. They never see the training
    module.

    Attributes:
        needs: "trajectories": transitions are steps of the stored trajectories; "samples": the last step of each, whose
            ``next_latents`` are the final latents; "gradients": whole trajectories, to differentiate the reward along
            them (:class:`~dblightning.objectives.reward_gradient.RewardGradient` and its subclasses).
        keeps_old: whether rollouts are sampled by an old policy, the frozen adapter behind ``policy.old``, which
            follows the one in training by :meth:`old_decay`.
        noise_draws: where above 0, transitions are not steps but final samples noised anew, so many times each in a
            pass: ``latents`` is the noised sample, ``step_index`` its noise level and ``next_latents`` the sample.
        stores: what a rollout stores of each step beside latents and log-probs: "mean", the mean of its Gaussian under
            the policy that sampled it, which doubles the buffer's memory.
        several: whether the adapters of a basis may be trained by it together, each with an objective of its own.
        per_adapter: its settings of which each adapter of a basis may have a value of its own (:class:`BasisAdapter`).
    """

    needs: ClassVar[Needs] = "trajectories"
    keeps_old: ClassVar[bool] = False
    noise_draws: int = 0
    text_dropout: float = 0.0
    stores: ClassVar[tuple[Literal["mean"], ...]] = ()
    several: ClassVar[bool] = True
    per_adapter: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Of subclasses that are dataclasses: their settings' ranges."""
        check_settings(vars(self))

    def of_adapter(self, name: str, settings: Mapping[str, Any]) -> Objective:
        """A copy for one adapter of a basis, with its own values of some settings; itself where it has none.

        Raises:
            ValueError: a setting that the objective does not have, or not one per adapter.
        """
        for setting in settings:
            check(
                setting in self.per_adapter,
                f"adapters.{name}.{setting} is not a setting of objective {type(self).__name__}; leave it out",
            )
        if not settings:
            return self
        found = copy.deepcopy(self)
        for setting, value in settings.items():
            setattr(found, setting, value)
        return found

    def check(self, settings: TrainingSettings) -> None:  # noqa: B027  # most go with any
        """Refuse training settings that do not go with the objective, before any work.

        Raises:
            ValueError: naming the setting, its value and what to do.
        """

    def check_reward(self, reward: Any) -> None:  # noqa: B027  # most take any
        """Refuse a reward, a ``RewardMetric``, that the objective cannot train on.

        Raises:
            ValueError: naming the reward and what to do.
        """

    def kept(self, prompt_ids: Tensor, rewards: Tensor) -> Tensor:
        """Which images of a rollout are stored, bool (B,); by default all.

        Args:
            prompt_ids: of all ranks' images, int64 (B,).
            rewards: (B,), on the CPU; NaN and infinite ones are never stored.
        """
        return torch.ones(len(rewards), dtype=torch.bool)

    def old_decay(self, rollouts: int) -> float:
        """η of the old policy after so many rollouts, in [0, 1]: 0 is the current policy."""
        return 0.0

    @abstractmethod
    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """The loss, a scalar, and what to log about it.

        Args:
            policy: the denoiser.
            transitions: (B, …), with ``advantage`` filled in.
        """

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most have none
        """Resume from a :meth:`state_dict`."""
