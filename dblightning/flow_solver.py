"""The timesteps of a flow-matching run, and a solver whose steps are those of :mod:`flow`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dblightning.ddim import Prediction
from dblightning.flow import (
    FlowNoise,
    StepCoefficients,
    cps_coefficients,
    flow_gaussian,
    flow_sde_diffusion,
    sde_coefficients,
    velocity_prediction,
)
from dblightning.gaussian_step import GaussianStep
from dblightning.noise import ImageNoise
from dblightning.schedule import check_num_inference_steps
from dblightning.settings import Number

#: η of each way to draw noise; published: Flow-SDE 0.7 … 1.2, Dance-SDE 0.3, CPS 0.8
ETAS: dict[str, Number] = {
    "flow_sde": Number(least=0, most=2),
    "dance_sde": Number(least=0, most=2),
    "cps": Number(least=0, most=1),
}


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler's configuration is of flow matching."""
    return (
        # a scheduler made by hand does not say its class's name
        ("shift" in scheduler_config and "beta_schedule" not in scheduler_config)
        or bool(scheduler_config.get("use_flow_sigmas"))
        or scheduler_config.get("prediction_type") == "flow_prediction"
    )


class FlowSchedule:
    """The σ's of one run, from the configuration of a diffusers scheduler of flow matching.

    Args:
        scheduler_config: of a FlowMatchEulerDiscreteScheduler, or another whose σ's it can have.
        num_inference_steps: number T of denoising steps; None where ``sigmas`` are given.
        sigmas: before the shift, T decreasing values in (0, 1]; None is the scheduler's own grid.
        mu: of the dynamic shift, where the configuration has one.
        shift: in place of the configuration's static one, as the scheduler's ``set_shift`` does.

    Attributes:
        timesteps: float32 (T,), decreasing; 1000 σ.
        sigmas, sigmas_next: σ at each step's start and end, float64 (T,); the last ends at 0.

    Raises:
        ValueError: a dynamic shift without μ, σ's that do not fall from 1 to above 0, inverted ones, or a number of
            steps that the schedule does not have.
    """

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        num_inference_steps: int | None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        shift: float | None = None,
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
        config = {name: value for name, value in scheduler_config.items() if name in known}
        if scheduler_config.get("flow_shift") is not None:  # as DPM-Solver and UniPC call it
            config["shift"] = scheduler_config["flow_shift"]
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        if shift is not None:
            scheduler.set_shift(shift)
        if scheduler.config["invert_sigmas"]:
            raise ValueError("inverted σ's (invert_sigmas) are not known here; use a scheduler without them")
        if scheduler.config["use_dynamic_shifting"] and mu is None:
            raise ValueError(
                "the scheduler shifts its σ's by the size of an image (use_dynamic_shifting), and no mu is given; pass "
                "the options that backbone.schedule_options(num_inference_steps, size) returns"
            )
        if sigmas is None or num_inference_steps is not None:
            trained = int(scheduler.config["num_train_timesteps"])
            num_inference_steps = check_num_inference_steps(num_inference_steps, trained)
        given: dict[str, Any] = {} if sigmas is None else {"sigmas": list(sigmas)}
        scheduler.set_timesteps(num_inference_steps, mu=mu, **given)
        self.timesteps: Tensor = scheduler.timesteps.float()
        edges: Tensor = scheduler.sigmas.double()
        if not (bool((edges.diff() < 0).all()) and 0 < float(edges[0]) <= 1):
            raise ValueError(f"sigmas must fall from at most 1 to above 0, got {[round(s, 4) for s in edges.tolist()]}")
        self.sigmas, self.sigmas_next = edges[:-1], edges[1:]

    def __len__(self) -> int:
        return len(self.timesteps)


class FlowSolver:
    """A flow's sampler with noise of any strength; its step is a Gaussian of known density, so it also serves training.

    The last step, to σ' = 0, is the ODE's: noise added there would stay in the image. It has no density and is never
    trained on.

    Args:
        schedule: timesteps and σ's.
        eta: η, 0 deterministic: the ODE.
        noise: how a step with η > 0 draws noise: "flow_sde", "dance_sde" or "cps".

    Raises:
        ValueError: an unknown noise, or an η that it does not have.
    """

    def __init__(self, schedule: FlowSchedule, eta: float, noise: FlowNoise = "cps") -> None:
        check_flow_eta(eta, noise)
        self.schedule = schedule
        self.eta = eta
        self.noise = noise
        self.timesteps = schedule.timesteps
        self._coefficients = self._of_steps()

    def _of_steps(self) -> StepCoefficients:
        """Float64 (T,) each."""
        sigma, following, eta = self.schedule.sigmas, self.schedule.sigmas_next, float(self.eta)
        if self.noise == "cps":
            return cps_coefficients(following, eta)
        diffusion = torch.full_like(sigma, eta)
        if self.noise == "flow_sde":
            # a single step has no second value, and no noise either
            diffusion = flow_sde_diffusion(sigma, eta, following[0])
        diffusion = torch.where(following > 0, diffusion, 0)
        return sde_coefficients(sigma, following, diffusion)

    def at(self, step_index: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor, StepCoefficients]:
        """σ, σ', c and s of a step (int) or of each row's step (Tensor (B,)), float64 (·, 1, 1, 1)."""
        index = torch.as_tensor(step_index).reshape(-1).cpu()
        shape = (-1, *[1] * (like.ndim - 1))
        parts = (self.schedule.sigmas, self.schedule.sigmas_next, *self._coefficients)
        sigma, following, direction, std = (
            each[index].to(like.device, non_blocking=True).view(shape) for each in parts
        )
        return sigma, following, StepCoefficients(direction, std)

    @property
    def trainable(self) -> int:
        """Steps 0 … this − 1 have noise, if η > 0: all but the last."""
        return len(self.timesteps) - 1

    def initial(self, noise: Tensor) -> Tensor:
        """x of standard normal noise (B, C, h, w): the noise itself."""
        return noise

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The denoiser's input: the latents themselves."""
        return latents

    def gaussian(self, output: Tensor, latents: Tensor, step_index: int | Tensor) -> GaussianStep:
        """The step as a Gaussian; ``step_index`` is one for all rows, or int64 (B,)."""
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return flow_gaussian(output.to(latents.dtype), latents, *self.at(step_index, latents))

    def predicted(self, output: Tensor, latents: Tensor, step_index: int | Tensor) -> Prediction:
        """x̂₀ and ε̂ of a velocity, (B, C, h, w) each."""
        return velocity_prediction(output.to(latents.dtype), latents, self._sigma(step_index, latents))

    def original(self, output: Tensor, latents: Tensor, step_index: int | Tensor, detach: bool = False) -> Tensor:
        """x̂₀ = x − σ v; ``detach`` treats ε̂ as a constant: ∂x̂₀/∂x = 1/(1−σ), taken as 0 at σ = 1 (pure noise)."""
        if not detach:
            return self.predicted(output, latents, step_index).original
        fixed = latents.detach()
        original = self.predicted(output.detach(), fixed, step_index).original
        clean = 1 - self._sigma(step_index, latents)
        return original + (latents - fixed) / torch.where(clean > 0, clean, torch.inf)

    def noised(self, x0: Tensor, noise: Tensor, step_index: int | Tensor) -> Tensor:
        """x_σ = (1−σ) x₀ + σ ε at the start of a step (one for all rows, or one per row)."""
        sigma = self._sigma(step_index, x0)
        return (1 - sigma) * x0 + sigma * noise

    def _sigma(self, step_index: int | Tensor, like: Tensor) -> Tensor:
        return self.at(step_index, like)[0].to(torch.promote_types(like.dtype, torch.float32))

    def stds(self) -> Tensor:
        """s of every step, float64 (T,); the last is 0."""
        return self._coefficients.std

    def levels(self) -> Tensor:
        """1 − σ and σ at each step's start, and after the last: float64 (T + 1, 2)."""
        sigmas = torch.cat([self.schedule.sigmas, self.schedule.sigmas_next[-1:]])
        return torch.stack([1 - sigmas, sigmas], dim=1)

    def step(self, output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1) -> Tensor:
        """The next latents (B · copies, C, h, w), float32; a step without noise draws none."""
        gaussian = self.gaussian(output, latents, step_index)
        if self._coefficients.std[step_index] == 0:
            return gaussian.mean
        return gaussian.sample(noise(latents.shape[1:], copies))


def check_flow_eta(eta: float, noise: str) -> None:
    """Raises ValueError for an unknown noise, or an η that it does not have."""
    if noise not in ETAS:
        raise ValueError(f"noise of a flow must be one of {', '.join(get_args(FlowNoise))}, got {noise!r}")
    if not ETAS[noise].allows(eta):
        raise ValueError(f"eta of {noise} must be {ETAS[noise]} (0 is the ODE), got {eta!r}")


def make_flow_solver(
    scheduler: Any,
    num_inference_steps: int | None,
    eta: float | None = None,
    noise: FlowNoise | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> FlowSolver:
    """The solver of a flow's scheduler or its configuration.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler, or a configuration.
        num_inference_steps, sigmas, mu: see :class:`FlowSchedule`.
        eta: η; None is 0, or 1 of CPS where the scheduler is set to ``stochastic_sampling``, whose rule that is.
        noise: how steps with η > 0 draw noise; None is CPS.

    Raises:
        ValueError: see :class:`FlowSchedule` and :class:`FlowSolver`.
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    shift = None if scheduler is config else scheduler.shift  # set_shift leaves the configuration as it was
    if eta is None:
        eta = 1.0 if config.get("stochastic_sampling") and noise in (None, "cps") else 0.0
    return FlowSolver(FlowSchedule(config, num_inference_steps, sigmas, mu, shift), eta, noise or "cps")
