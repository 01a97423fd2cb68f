"""Solvers: what turns a prediction into the next latents."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor

from dblightning.noise import ImageNoise
from dblightning.schedule import DDIMSchedule, GaussianStep, predict_original, to_epsilon


class Solver(Protocol):
    """What turns predictions into the next latents."""

    timesteps: Tensor

    def initial(self, noise: Tensor) -> Tensor:
        """The first latents from standard normal noise."""
        ...

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The latents as the denoiser wants them."""
        ...

    def step(
        self, model_output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1
    ) -> Tensor:
        """The next latents; ``copies`` rows per image where a search rolls several."""
        ...


class DDIMSolver:
    """DDIM with any η; its step is a Gaussian with a known density, so it also serves training.

    Args:
        schedule: timesteps and ᾱ.
        eta: 0 deterministic … 1 DDPM.
    """

    def __init__(self, schedule: DDIMSchedule, eta: float) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie between 0 (deterministic) and 1 (DDPM), got {eta}")
        self.schedule = schedule
        self.eta = eta
        self.timesteps = schedule.timesteps

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        return latents

    def gaussian(self, model_output: Tensor, latents: Tensor, step_index: int | Tensor) -> GaussianStep:
        """The step's distribution; ``step_index`` may differ per row."""
        return self.schedule.step(model_output, latents, step_index, self.eta)

    def original(self, model_output: Tensor, latents: Tensor, step_index: int, detach: bool = False) -> Tensor:
        """Tweedie's x̂₀ of the latents at a step; ``detach`` treats ε as a constant."""
        alpha, _ = self.schedule.at(step_index, latents)
        epsilon = to_epsilon(model_output, latents, alpha, self.schedule.prediction_type)
        return predict_original(epsilon.detach() if detach else epsilon, latents, alpha)

    def step(
        self, model_output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1
    ) -> Tensor:
        gaussian = self.gaussian(model_output, latents, step_index)
        if self.eta == 0:
            return gaussian.mean
        return gaussian.sample(noise(latents.shape[1:], copies))


class DiffusersSolver:
    """Any solver of diffusers' schedulers: DPM-Solver++ (SDE or ODE), Euler-ancestral, …

    Args:
        scheduler: a diffusers scheduler; it is copied, so one object can serve many runs.
        num_inference_steps: number T of denoising steps.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int) -> None:
        self.scheduler = type(scheduler).from_config(scheduler.config)
        self.num_inference_steps = num_inference_steps
        self.scheduler.set_timesteps(num_inference_steps)
        self.timesteps: Tensor = self.scheduler.timesteps
        self._takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters

    def initial(self, noise: Tensor) -> Tensor:
        self.scheduler.set_timesteps(self.num_inference_steps)  # forget an earlier run's history
        return noise * float(self.scheduler.init_noise_sigma)

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        return self.scheduler.scale_model_input(latents, self.timesteps[step_index])

    def step(
        self, model_output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1
    ) -> Tensor:
        extra = {"generator": noise.generators} if self._takes_generator else {}
        return self.scheduler.step(model_output, self.timesteps[step_index], latents, return_dict=False, **extra)[0]
