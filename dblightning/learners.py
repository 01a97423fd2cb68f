"""The adapters that a run trains, one or several; what is an only one's can be read off the run itself."""

from __future__ import annotations

from typing import cast

import lightning as L
from torch import Tensor, nn

from dblightning.learner import Learner
from dblightning.objectives.advantages import PromptStatistics
from dblightning.objectives.base import Objective
from dblightning.objectives.kl import KLTerm
from dblightning.objectives.old_policy import OldPolicy
from dblightning.objectives.value import ValueFunction
from dblightning.replay import ReplayBuffer
from dblightning.rewards.base import RewardMetric


class Learners(L.LightningModule):
    """The part of ``RewardRLModule`` that holds its learners.

    ``reward``, ``objective``, ``kl``, ``statistics``, ``value_function``, ``replay`` and ``adapter_name`` are those of
    the adapter in training; with several, of the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._learners = nn.ModuleList()

    @property
    def learners(self) -> list[Learner]:
        """The adapters in training, in the order of ``Transitions.adapter``."""
        return cast(list[Learner], list(self._learners))

    def learner(self, name: str | None = None) -> Learner:
        """The learner of an adapter; None: the first.

        Raises:
            ValueError: no such adapter in training.
        """
        for each in self.learners:
            if name in (None, each.name):
                return each
        raise ValueError(f"no adapter {name!r} is in training; the run's are {', '.join(self.adapter_names)}")

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters in training."""
        return [learner.name for learner in self.learners]

    @property
    def adapter_name(self) -> str:
        """Name of the first of them."""
        return self.learners[0].name

    @property
    def reward(self) -> RewardMetric:
        """What it learns from."""
        return self.learners[0].reward

    @property
    def objective(self) -> Objective:
        """Of its updates."""
        return self.learners[0].objective

    @property
    def kl(self) -> KLTerm:
        """Its KL term."""
        return self.learners[0].kl

    @property
    def value_function(self) -> ValueFunction:
        """Its value function."""
        return self.learners[0].value_function

    @property
    def statistics(self) -> PromptStatistics:
        """Of its prompts' rewards."""
        return self.learners[0].statistics

    @property
    def replay(self) -> ReplayBuffer | None:
        """Its replay buffer; None before the first rollout."""
        return self.learners[0].replay

    @property
    def old(self) -> OldPolicy:
        """The policy that samples its rollouts, where that is another."""
        return self.learners[0].old

    @property
    def latest_images(self) -> tuple[Tensor, list[str], Tensor] | None:
        """Of the last rollout: images, prompts and rewards."""
        return self.learners[0].latest_images

    @property
    def kl_weight(self) -> float:
        """The weight of the KL, which moves where there is a target."""
        return self.kl.weight

    @kl_weight.setter
    def kl_weight(self, weight: float) -> None:
        self.kl.weight = weight
