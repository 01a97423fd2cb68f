"""Trajectories for the policy gradient: every step's latents and log-prob."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dblightning.backbone import Backbone, Conditioning
from dblightning.blending import Blend
from dblightning.execution import Execution
from dblightning.gaussian_step import gaussian_log_prob
from dblightning.noise import ImageNoise
from dblightning.sampling import StepRecord, denoise_loop
from dblightning.solvers import GaussianSolver


class Trajectory(NamedTuple):
    """One rollout of B images over T steps, float32."""

    latents: Tensor  # (T + 1, B, C, h, w), from noise to image
    log_probs: Tensor  # (T, B), of latents[t + 1] given latents[t]; mean over C, h, w


@torch.no_grad()
def rollout(
    backbone: Backbone,
    conditioning: Conditioning,
    solver: GaussianSolver,
    blend: Blend,
    noise: ImageNoise,
    guidance_scale: float,
    execution: Execution = "auto",
) -> Trajectory:
    """Sample trajectories for the policy gradient, with the log-prob of every step.

    The log-prob is evaluated on the stored float32 latents, so that the on-policy ratio is 1 up to kernel noise.

    Raises:
        ValueError: a step without noise (eta 0), which has no density.
    """
    stds = solver.stds()
    if bool((stds <= 0).any()):
        raise ValueError(
            f"step {int((stds <= 0).nonzero()[0])} adds no noise (eta {solver.eta}), so it has no density; "
            "train with eta > 0 and a scheduler whose set_alpha_to_one is false"
        )
    states: list[Tensor] = []
    log_probs: list[Tensor] = []

    def record(step: StepRecord) -> None:
        states.append(step.latents)
        taken = solver.gaussian(step.output, step.latents, step.step_index)
        log_probs.append(gaussian_log_prob(taken, step.next_latents))

    last = denoise_loop(
        backbone, conditioning, solver, blend, noise, guidance_scale=guidance_scale, execution=execution, on_step=record
    )
    return Trajectory(torch.stack([*states, last]), torch.stack(log_probs))
