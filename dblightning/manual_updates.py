"""Optimiser steps by hand: gradients averaged over ranks once a step, checked, clipped; learning rates by rollout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


class ManualUpdates(RunState):
    """The part of ``RewardRLModule`` that steps its two optimisers, the policy's and the value function's."""

    seed: int
    _share: float  # of this rank's gradient: its stored steps by the ranks' mean
    _most_held: int  # trajectories held by the rank that holds most
    _norm: Tensor | None

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters of the policy's optimiser: the adapter's."""
        return self.backbone.adapters.parameters(self.adapter_name)

    @property
    def policy_norm_limit(self) -> float:
        """Largest gradient norm of a policy step; a longer gradient is shortened to it."""
        return float(self.settings.optimisation.clip_grad_norm)

    @property
    def learning_rate(self) -> float:
        """The policy's learning rate of this rollout."""
        rate = float(self.settings.optimisation.learning_rate)
        if self.settings.optimisation.schedule == "constant":
            return rate
        total = self.total_rollouts
        check(total is not None, "a linear learning rate needs --trainer.max_epochs or max_steps to know its end")
        return rate * max(0.0, 1 - self.rollouts_done / int(total or 1))

    def set_learning_rate(self) -> None:
        """Give the policy's optimiser the rate of the coming rollout, before callbacks log it."""
        set_options(self._optimizers()[0], lr=self.learning_rate)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimisation, value_rate = self.settings.optimisation, self.settings.advantage.value_learning_rate
        return [
            torch.optim.AdamW(
                self.policy_parameters, lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay
            ),
            torch.optim.AdamW(self.value_function.parameters(), lr=value_rate),
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

    def _policy_batches(self) -> Iterator[Iterable[Transitions]]:
        """The micro-batches of each optimiser step of the policy's update: as many steps on every rank."""
        settings = self.settings.optimisation
        if settings.epochs is None:
            batches = self._batches(settings.batch_size, "policy")
            for _ in range(settings.policy_steps):
                yield islice(batches, settings.accumulation)
            return
        first, last = self._trained_on("policy")
        whole = settings.batch_size * settings.accumulation
        for epoch in range(settings.epochs):
            batches = self._pass(settings.batch_size, epoch)
            for _ in range(-(-self._most_held * (last - first) // whole)):
                yield islice(batches, settings.accumulation)

    def _batches(self, count: int, use: str) -> Iterator[Transitions]:
        """Endless batches of ``count`` stored steps; none on a rank that holds no sample with a finite reward."""
        if self.replay is None:
            return
        first, last = self._trained_on(use)

        def seed(lane: int, visit: int) -> int:
            return self._order_seed(lane, visit, use)

        for number, batch in enumerate(self.replay.batches(count, seed, last, self.ranks.rank, first)):
            visit = number * count // (self.replay.size * (last - first))
            yield self._transitions(self.replay, *batch, visit, use)

    def _pass(self, count: int, epoch: int) -> Iterator[Transitions]:
        """Batches of at most ``count``, every stored step that the policy is trained on in one of them."""
        if self.replay is None:
            return
        first, last = self._trained_on("policy")

        def seed(lane: int) -> int:
            return self._order_seed(lane, epoch, "policy")

        for batch in self.replay.epoch(count, seed, last, self.ranks.rank, first):
            yield self._transitions(self.replay, *batch, epoch, "policy")

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

    def _step(self, optimizer: Any, parameters: Any, share: float = 1.0) -> Tensor | None:
        """Average the gradients over ranks, once; then clip, step, reset.

        Args:
            optimizer: of the parameters.
            parameters: the same on every rank.
            share: what this rank's gradient counts; over the ranks the shares average 1.

        Returns:
            The norm before clipping; None where a float16 loss scaler skipped the step.

        Raises:
            NonFiniteError: the gradients are NaN or infinite; on every rank, before the step.
        """
        self.ranks.average_gradients(list(parameters), share)
        optimizer.step()
        optimizer.zero_grad()
        return self._norm

    def _backward_of_nothing(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of zero, by the way all gradients come: a rank without samples keeps its loss scale in step."""
        self.manual_backward(torch.stack([parameter.sum() for parameter in parameters]).sum() * 0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # here, where a float16 loss scale is already taken out of the gradients
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        policy = parameters[0] is self.policy_parameters[0]
        limit = self.policy_norm_limit if policy else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self._norm = norm if self.gradients_are_finite(norm, parameters, "policy" if policy else "value") else None

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
