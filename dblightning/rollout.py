"""Trajectories for the policy gradient: every step's latents and log-prob."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from dblightning.window import WindowedSolver


class Trajectory(NamedTuple):
    """The stored steps of one rollout of B images, T of them, float32."""

    latents: Tensor  # (T + 1, B, C, h, w), from noise to image
    log_probs: Tensor  # (T, B), of latents[t + 1] given latents[t]; mean over C, h, w
    start: int = 0  # index of the first of them in the solver's schedule
    final: Tensor | None = None  # (B, C, h, w), where the image is not latents[T]
    means: Tensor | None = None  # (T, B, C, h, w) of each step's Gaussian, where an objective asks for them
    kl_to_go: Tensor | None = None  # (T, B), nats, less its mean over images, where the advantage is to subtract it

    @property
    def image(self) -> Tensor:
        """The final latents, (B, C, h, w)."""
        return self.latents[-1] if self.final is None else self.final

    def of(self, rows: Tensor | slice) -> Trajectory:
        """Some of its images: ``rows`` is bool (B,), int64 (n,) or a slice."""
        final = None if self.final is None else self.final[rows]
        means = None if self.means is None else self.means[:, rows]
        to_go = None if self.kl_to_go is None else self.kl_to_go[:, rows]
        return Trajectory(self.latents[:, rows], self.log_probs[:, rows], self.start, final, means, to_go)

    @staticmethod
    def joined(parts: Sequence[Trajectory]) -> Trajectory:
        """The images of several parts of one rollout."""
        final = None if parts[0].final is None else torch.cat([part.image for part in parts])
        latents, log_probs = (torch.cat(each, dim=1) for each in list(zip(*parts, strict=True))[:2])
        means = (
            None if parts[0].means is None else torch.cat([part.means for part in parts if part.means is not None], 1)
        )
        return Trajectory(latents, log_probs, parts[0].start, final, means)


@torch.no_grad()
def rollout(
    backbone: Backbone,
    conditioning: Conditioning,
    solver: GaussianSolver,
    blend: Blend,
    noise: ImageNoise,
    guidance_scale: float,
    execution: Execution = "auto",
    window: WindowedSolver | None = None,
    keep_means: bool = False,
    final_only: bool = False,
) -> Trajectory:
    """Sample trajectories for the policy gradient, with the log-prob of every step.

    With a window of the solver's steps only those are stochastic and stored; the others follow the ODE. With
    ``final_only`` nothing but the final latents is kept, as one step of log-prob 0 that begins where it ends; so any
    sampler will do.

    The log-prob is evaluated on the stored float32 latents, so that the on-policy ratio is 1 up to kernel noise.

    A step at the end that no solver of this kind has noise for (see ``GaussianSolver.trainable``) has no density: its
    log-prob is stored as 0 and never trained on.

    Raises:
        ValueError: another step without noise (eta 0).
    """
    if solver.trainable < 1:
        raise ValueError(f"{len(solver.timesteps)} denoising steps leave none with noise to train on; take more")
    steps = range(len(solver.timesteps)) if window is None else range(window.start, window.start + window.size)
    if not final_only:
        check_density(solver, steps[: solver.trainable])
    states: list[Tensor] = []
    log_probs: list[Tensor] = []
    means: list[Tensor] = []

    def record(step: StepRecord) -> None:
        if step.step_index not in steps:
            return
        states[-1:] = [step.latents, step.next_latents]
        taken = solver.gaussian(step.output, step.latents, step.step_index)
        density = step.step_index < solver.trainable
        log_probs.append(gaussian_log_prob(taken, step.next_latents) if density else torch.zeros_like(log_probs[0]))
        if keep_means:
            means.append(taken.mean)

    last = denoise_loop(
        backbone, conditioning, window or solver, blend, noise, guidance_scale=guidance_scale, execution=execution,
        on_step=None if final_only else record,
    )  # fmt: skip
    if final_only:
        return Trajectory(torch.stack([last, last]), last.new_zeros(1, len(last)))
    final = None if window is None else last
    kept = torch.stack(means) if keep_means else None
    return Trajectory(torch.stack(states), torch.stack(log_probs), steps.start, final, kept)


def check_density(solver: GaussianSolver, steps: Iterable[int]) -> None:
    """Refuse steps to train on that add no noise.

    Raises:
        ValueError: naming the first.
    """
    stds = solver.stds().tolist()
    for step in steps:
        if stds[step] <= 0:
            raise ValueError(
                f"step {step} adds no noise (eta {solver.eta}), so it has no density; "
                "train with eta > 0 and a scheduler whose set_alpha_to_one is false"
            )
