"""The KL term of eq. (4): its forms, the rows it is computed of, and a weight that seeks a target."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dblightning.noise import image_seed
from dblightning.objectives.policy import AdapterPolicy
from dblightning.replay import Transitions
from dblightning.schedule import gaussian_kl
from dblightning.solvers import GaussianSolver
from dblightning.training_settings import KLSettings


def adapted_kl_weight(kl_weight: float, kl: float, target: float) -> float:
    """The KL weight of the next rollout: up a little if the KL exceeds its target, else down.

    The proportional controller of Ziegler et al. 2019 ("Fine-tuning language models from human preferences", section
    2.2): w ← w (1 + 0.1 e) with e = clip(kl / target − 1, −0.2, 0.2), so at most 2 % per rollout.

    Args:
        kl_weight: the weight so far, > 0.
        kl, target: path KL measured and wanted, nats.
    """
    return kl_weight * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def epsilon_error(solver: GaussianSolver, output: Tensor, reference_output: Tensor, transitions: Transitions) -> Tensor:
    """‖ε_θ − ε_pre‖² averaged over the latents' dimensions, (B,): DPOK's penalty, see ``schedule.mean_sensitivity``.

    Args:
        solver: of the rollouts.
        output, reference_output: the model's with and without the adapter, (B, C, h, w).
        transitions: (B, …).
    """
    epsilon, reference_epsilon = (
        solver.predicted(each, transitions.latents, transitions.step_index).epsilon
        for each in (output, reference_output)
    )
    return (epsilon - reference_epsilon).square().flatten(1).mean(1)


class Watched(NamedTuple):
    """Inputs of the KL, computed before the forward with gradients: its activations wait for the backward pass."""

    transitions: Transitions
    rows: Tensor | None  # which of the micro-batch they are, int64 (n,); None: all
    own: Tensor | None  # float32 output with the adapter; None where the gradient's own will do
    reference: Tensor  # output of the base model


class KLTerm:
    """The KL to the base model, and its weight over a run.

    Args:
        settings: of the term.
        seed: of the run; it draws the rows.
    """

    def __init__(self, settings: KLSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.weight = float(settings.weight)  # moves where there is a target

    def weight_at(self, rollout: int) -> float:
        """The weight in the loss after so many rollouts: zero while the term warms up."""
        return self.weight if rollout >= self.settings.warmup else 0.0

    def adapt(self, kl: float, rollout: int) -> None:
        """Move the weight towards the target, if there is one, by a path KL measured after so many rollouts."""
        target = self.settings.target
        # a step that a float16 loss scaler skipped may have measured no KL
        if target is not None and math.isfinite(kl) and rollout >= self.settings.warmup:
            self.weight = adapted_kl_weight(self.weight, kl, target)

    def rows(self, count: int, visit: int, rollout: int, rank: int) -> Tensor | None:
        """Which of a micro-batch's ``count`` transitions the KL is computed of, int64 (n,); None: all.

        n is ``share`` of them, carried over from micro-batch to micro-batch where that is not a whole number.
        """
        wanted = float(self.settings.share) * count
        if wanted >= count:
            return None
        # 1e-9: 0.1 · 30 is a little more than 3
        before, after = (math.ceil(visits * wanted - 1e-9) for visits in (visit, visit + 1))
        generator = torch.Generator().manual_seed(image_seed(self.seed, rollout, visit, f"kl rows {rank}"))
        return torch.randperm(count, generator=generator)[: after - before]

    @torch.no_grad()
    def watch(self, policy: AdapterPolicy, chosen: Transitions, rows: Tensor | None) -> Watched:
        """Run what the KL compares, of transitions that are these rows of a micro-batch (None: all of it)."""
        if self.settings.precision == "model" or policy.in_float32(chosen.latents.device):
            return Watched(chosen, rows, None, policy.reference(chosen))
        own = policy.watched(chosen)
        return Watched(chosen, rows, own, policy.reference(chosen, float32=True))

    def loss(
        self, policy: AdapterPolicy, transitions: Transitions, watched: Watched, rollout: int
    ) -> tuple[Tensor, Tensor]:
        """The weighted penalty after so many rollouts, and the exact KL of a step in nats: means, scalars."""
        rows, own, solver = watched.rows, watched.own, policy.solver
        chosen, output, step = watched.transitions, policy.current(transitions), policy.step(transitions)
        if rows is not None or own is not None:
            output = output if rows is None else output[rows.to(output.device)]
            if own is not None:
                # the float32 value with the gradient of the forward there is: what rounding spoils is the difference of
                # two predictions, to which the KL's gradient is proportional, not a prediction's own derivative
                output = own + (output - output.detach())
            step = solver.gaussian(output, chosen.latents, chosen.step_index)
        exact = gaussian_kl(step, solver.gaussian(watched.reference, chosen.latents, chosen.step_index))
        if self.settings.form == "exact":
            penalty = exact / chosen.latents[0].numel()  # the log-prob is a mean over dimensions too
        else:
            penalty = epsilon_error(solver, output, watched.reference, chosen)
        share = 1.0 if rows is None else len(rows) / (self.settings.share * len(transitions.reward))
        return self.weight_at(rollout) * share * penalty.mean(), exact.mean()
