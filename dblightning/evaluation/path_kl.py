"""The path KL of an image's policy to the base model, eq. (4)'s sum over the steps that were taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dblightning.gaussian_step import GaussianStep, gaussian_kl
from dblightning.sampling import StepRecord
from dblightning.solvers import GaussianSolver


def path_kl(solver: GaussianSolver, steps: Iterable[StepRecord], reference: Callable[[StepRecord], Tensor]) -> Tensor:
    """Σ_t KL(p(·|x_t) ‖ p_pre(·|x_t)) = Σ_t ‖μ_t − μ_t,pre‖² / (2 σ_t²) along each image's own path.

    Its mean over paths is the KL between the laws of whole paths (eq. (4) of Diffusion Blend). Where a method draws an
    adapter per step, it is that of the steps drawn, which is at least that of their mixture. On a flow the path ends
    before the last step, the ODE's, which is a function of it.

    Args:
        solver: of the steps.
        steps: every step, each of B images.
        reference: the base model's output at a step, (B, C, h, w).

    Returns:
        (B,) nats, float64.
    """
    total: Tensor | float = 0.0
    for each in steps:
        if each.step_index >= solver.trainable:
            continue
        # float64: the difference of two means near one another
        latents = each.latents.double()
        mean, std = solver.gaussian(each.output.double(), latents, each.step_index)
        base = solver.gaussian(reference(each).double(), latents, each.step_index)
        mean = mean if each.shift is None else mean + each.shift.double()
        total = total + gaussian_kl(GaussianStep(mean, std), base)
    return torch.as_tensor(total)


def check_noise(solver: GaussianSolver) -> None:
    """Refuse steps without noise, between which a KL is 0 or infinite; a flow's last step never has any.

    Raises:
        ValueError: naming the first such step.
    """
    silent = (solver.stds()[: solver.trainable] == 0).nonzero().flatten().tolist()
    if silent:
        raise ValueError(
            f"kl needs noise in every step, and step {silent[0] + 1} of {len(solver.timesteps)} has none (eta "
            f"{solver.eta:g}): set eta above 0 and a scheduler whose last step does not end at ᾱ = 1, or kl to false"
        )
