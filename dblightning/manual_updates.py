"""Optimiser steps by hand: gradients averaged over ranks once a step, checked, clipped; learning rates by rollout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dblightning.learner import Batches, Learner
from dblightning.lightning_internals import attached_trainer
from dblightning.noise import image_seed
from dblightning.objectives.advantages import check_groups
from dblightning.objectives.draws import Draws
from dblightning.replay import ReplayBuffer, Transitions
from dblightning.run_state import RunState
from dblightning.settings import check


def set_options(optimizer: Any, **options: float) -> None:
    """Give every parameter group these options: a checkpoint's optimizer brings those of the run it is of."""
    for group in optimizer.param_groups:
        group.update(options)


def parameters_of(optimizer: Any) -> list[Tensor]:
    """The parameters that an optimiser changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class ManualUpdates(RunState):
    """The part of ``RewardRLModule`` that steps its two optimisers, the policy's and the value function's."""

    seed: int
    _norms: list[Tensor] | None

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters of the policy's optimiser: the adapters'."""
        return [each for learner in self.learners for each in self.adapter_parameters(learner)]

    def adapter_parameters(self, learner: Learner) -> list[nn.Parameter]:
        """The weights of one adapter in training."""
        return self.backbone.adapters.parameters(learner.name)

    def norm_limit(self, learner: Learner) -> float:
        """Largest gradient norm of an adapter's step; a longer gradient is shortened to it."""
        return float(learner.settings.optimisation.clip_grad_norm)

    @property
    def learning_rate(self) -> float:
        """The policy's learning rate of this rollout; with several adapters the first one's."""
        return self.learning_rate_of(self.learners[0])

    def learning_rate_of(self, learner: Learner) -> float:
        """An adapter's learning rate of this rollout."""
        rate = float(learner.settings.optimisation.learning_rate)
        if self.settings.optimisation.schedule == "constant":
            return rate
        total = self.total_rollouts
        check(total is not None, "a linear learning rate needs --trainer.max_epochs or max_steps to know its end")
        return rate * max(0.0, 1 - self.rollouts_done / int(total or 1))

    def set_learning_rate(self) -> None:
        """Give the policy's optimiser the rates of the coming rollout, before callbacks log them."""
        for learner, group in zip(self.learners, self._optimizers()[0].param_groups, strict=True):
            group["lr"] = self.learning_rate_of(learner)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        # a group of parameters per adapter
        policy = [
            {"params": self.adapter_parameters(each), "lr": each.settings.optimisation.learning_rate}
            for each in self.learners
        ]
        value = [{"params": list(each.value_function.parameters())} for each in self.learners]
        return [
            torch.optim.AdamW(policy, weight_decay=self.settings.optimisation.weight_decay),
            torch.optim.AdamW(value, lr=self.settings.advantage.value_learning_rate),
        ]

    def _optimizers(self) -> list[Any]:
        optimizers: Any = self.optimizers()
        return optimizers

    # ── transitions ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def trained_steps(self) -> int:
        """Stored steps 0 … this − 1 are trained on."""
        return self.window.trained

    def _check_groups(self, prompt_ids: Tensor) -> None:
        """Refuse groups of one image where the advantage is a comparison within groups. A collective call there."""
        if self.settings.advantage.baseline == "group":
            check_groups(torch.cat(self.ranks.gather(prompt_ids.cpu())))

    def _policy_turns(self) -> Iterator[Batches]:
        """The optimiser steps of the policy's update: the adapters that take each, with their micro-batches of it."""
        steps = [(learner, self._policy_batches(learner)) for learner in self.learners]
        while turn := [(learner, iter(batches)) for learner, each in steps for batches in islice(each, 1)]:
            yield turn

    def _policy_batches(self, learner: Learner) -> Iterator[Iterable[Transitions]]:
        """The micro-batches of each of an adapter's optimiser steps: as many steps on every rank."""
        settings = self.settings.optimisation
        if settings.epochs is None:
            batches = self._batches(learner, settings.batch_size, "policy")
            for _ in range(settings.policy_steps):
                yield islice(batches, settings.accumulation)
            return
        first, last = self._trained_on("policy")
        whole = settings.batch_size * settings.accumulation
        for epoch in range(settings.epochs):
            batches = self._pass(learner, settings.batch_size, epoch)
            for _ in range(-(-learner.most_held * (last - first) // whole)):
                yield islice(batches, settings.accumulation)

    def _batches(self, learner: Learner, count: int, use: str) -> Iterator[Transitions]:
        """Endless batches of ``count`` stored steps; none on a rank that holds no sample with a finite reward."""
        if learner.replay is None:
            return
        first, last = self._trained_on(use)

        def seed(lane: int, visit: int) -> int:
            return self._order_seed(lane, visit, use)

        for number, batch in enumerate(learner.replay.batches(count, seed, last, self.ranks.rank, first)):
            visit = number * count // (learner.replay.size * (last - first))
            yield self._transitions(learner.replay, *batch, visit, use)

    def _pass(self, learner: Learner, count: int, epoch: int) -> Iterator[Transitions]:
        """Batches of at most ``count``, every stored step that the policy is trained on in one of them."""
        if learner.replay is None:
            return
        first, last = self._trained_on("policy")

        def seed(lane: int) -> int:
            return self._order_seed(lane, epoch, "policy")

        for batch in learner.replay.epoch(count, seed, last, self.ranks.rank, first):
            yield self._transitions(learner.replay, *batch, epoch, "policy")

    def _transitions(self, replay: ReplayBuffer, slots: Tensor, steps: Tensor, visit: int, use: str) -> Transitions:
        """Stored steps; or samples noised anew where the objective draws, of which ``steps`` are the numbers then."""
        if use != "policy" or self.objective.noise_draws == 0:
            return replay.transitions(slots, steps, self.device)
        samples = replay.transitions(slots, torch.full_like(steps, replay.num_steps - 1), self.device)
        # of earlier rollouts' samples they are others
        age = replay.rollouts - replay.born[slots]
        places = ((age * self.ranks.size + self.ranks.rank) * replay.capacity + replay.rows[slots]).tolist()
        objective = self.objective
        draws = Draws(self.seed, self.rollouts_done, objective.noise_draws, self.trained_steps, objective.text_dropout)
        return draws(self.solver, samples, places, steps.tolist(), visit)

    def _order_seed(self, lane: int, visit: int, use: str) -> int:
        return image_seed(self.seed, self.rollouts_done, lane, f"{use} order {visit}")

    def _trained_on(self, use: str) -> tuple[int, int]:
        """The stored steps in use, the first and one past the last."""
        if use == "policy" and self.objective.needs == "samples":
            draws = self.objective.noise_draws
            return (0, draws) if draws else (self.window.stored - 1, self.window.stored)
        return 0, self.trained_steps

    # ── optimiser steps ──────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor] | None:
        """Average the gradients over ranks, once; then clip, step, reset.

        Args:
            optimizer: of the parameters.
            parameters: of the adapters that take this step; the same on every rank.

        Returns:
            Each adapter's norm before clipping; None where a float16 loss scaler skipped the step.

        Raises:
            NonFiniteError: the gradients are NaN or infinite; on every rank, before the step.
        """
        taking = {id(parameter) for parameter in parameters}
        # a pass through a rollout trains on every rank's steps, each of which counts the same
        even = self._is_policy(optimizer) and self.settings.optimisation.epochs is not None
        for learner, group in zip(self.learners, optimizer.param_groups, strict=True):
            if id(group["params"][0]) in taking:
                self.ranks.average_gradients(group["params"], 1.0 if even else learner.share)
            else:
                for parameter in group["params"]:
                    parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        return self._norms

    def _backward_of_nothing(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of zero, by the way all gradients come: a rank without samples keeps its loss scale in step."""
        self.manual_backward(torch.stack([parameter.sum() for parameter in parameters]).sum() * 0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # here, where a float16 loss scale is already taken out of the gradients
        groups = [group["params"] for group in optimizer.param_groups]
        policy = self._is_policy(optimizer)
        norms = [
            nn.utils.clip_grad_norm_(group, self.norm_limit(learner) if policy else float("inf"))
            for learner, group in zip(self.learners, groups, strict=True)
        ]
        self._norms = norms if self._finite(norms, groups, "policy" if policy else "value") else None

    def _is_policy(self, optimizer: Any) -> bool:
        first: bool = optimizer.param_groups[0]["params"][0] is self.policy_parameters[0]
        return first

    def _finite(self, norms: list[Tensor], groups: list[list[Tensor]], name: str) -> bool:
        """Whether a step may be taken, by the first norm that is not finite."""
        whose = [f" of adapter {each.name!r}" if each.suffix else "" for each in self.learners]
        wrong = [place for place, norm in enumerate(norms) if not torch.isfinite(norm)] if len(norms) > 1 else []
        place = wrong[0] if wrong else 0
        parameters = [parameter for group in groups for parameter in group]
        return self.gradients_are_finite(norms[place], parameters, name, whose[place])

    def _check_precision(self) -> None:
        """Refuse precisions in which the adapter cannot learn."""
        precision, dtype = str(self.trainer.precision), next(self.backbone.parameters()).dtype
        check(
            precision not in ("bf16-true", "16-true"),
            f"precision {precision} would round the adapter and its optimizer to half precision, where small steps are "
            "lost; give the backbone a half-precision dtype (bfloat16), which keeps them in float32, and take "
            "--trainer.precision 32-true",
        )
        check(
            dtype != torch.float16 or precision == "16-mixed",
            f"a float16 backbone needs a scaled loss, or most of its gradient underflows, got precision {precision}; "
            "take --trainer.precision 16-mixed (on a GPU), or dtype bfloat16 and 32-true",
        )

    def _no_ddp_sync(self) -> AbstractContextManager[None]:
        """DDP's own gradient exchange is off: :meth:`_step` exchanges once per optimiser step."""
        model = self.trainer.strategy.model if attached_trainer(self) is not None else None
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _broadcast_nothing_frozen(self) -> None:
        """Every rank loads the same base model: DDP need not send it."""
        trainable = {id(parameter) for parameter in self.parameters() if parameter.requires_grad}
        frozen = [name for name, parameter in self.named_parameters() if id(parameter) not in trainable]
        buffers = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen + buffers)
