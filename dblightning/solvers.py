"""Solvers: what turns a prediction into the next latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from dblightning.ddim import Prediction, to_prediction
from dblightning.flow import FlowNoise
from dblightning.flow_solver import FlowSolver, is_flow, make_flow_solver
from dblightning.gaussian_step import GaussianStep
from dblightning.noise import ImageNoise
from dblightning.schedule import DDIMSchedule, check_num_inference_steps
from dblightning.settings import Number


class Solver(Protocol):
    """Interface of a solver: predictions to the next latents."""

    timesteps: Tensor

    def initial(self, noise: Tensor) -> Tensor:
        """The first latents from standard normal noise."""
        ...

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The latents as the denoiser wants them."""
        ...

    def step(self, output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1) -> Tensor:
        """The next latents; ``copies`` rows per image where a search rolls several."""
        ...


@runtime_checkable
class GaussianSolver(Solver, Protocol):
    """A solver whose step is a Gaussian of known density: what training, CoDe and RGG need."""

    eta: float

    @property
    def trainable(self) -> int:
        """Steps 0 … this − 1 have noise where η > 0."""
        ...

    def gaussian(self, output: Tensor, latents: Tensor, step_index: int | Tensor) -> GaussianStep:
        """The step's distribution; ``step_index`` may differ per row."""
        ...

    def predicted(self, output: Tensor, latents: Tensor, step_index: int | Tensor) -> Prediction:
        """What a model output says of the latents: x̂₀ and ε̂; ``step_index`` may differ per row."""
        ...

    def original(self, output: Tensor, latents: Tensor, step_index: int | Tensor, detach: bool = False) -> Tensor:
        """x̂₀ of the latents at a step; ``detach`` treats the noise prediction as a constant."""
        ...

    def noised(self, x0: Tensor, noise: Tensor, step_index: int | Tensor) -> Tensor:
        """The latents at a step's start, from an image's latents x₀ and standard normal noise."""
        ...

    def stds(self) -> Tensor:
        """Standard deviation of every step, float64 (T,)."""
        ...

    def levels(self) -> Tensor:
        """α and σ of x = α x₀ + σ ε at each step's start, and after the last step: float64 (T + 1, 2)."""
        ...


@overload
def make_solver(
    scheduler: Mapping[str, Any],
    num_inference_steps: int | None,
    eta: float | None = None,
    *,
    noise: FlowNoise | None = None,
    **custom: Any,
) -> DDIMSolver | FlowSolver: ...
@overload
def make_solver(
    scheduler: Any,
    num_inference_steps: int | None,
    eta: float | None = None,
    *,
    noise: FlowNoise | None = None,
    **custom: Any,
) -> DDIMSolver | FlowSolver | DiffusersSolver: ...
def make_solver(
    scheduler: Any,
    num_inference_steps: int | None,
    eta: float | None = None,
    *,
    noise: FlowNoise | None = None,
    **custom: Any,
) -> DDIMSolver | FlowSolver | DiffusersSolver:
    """The one factory of solvers: training, evaluation and the pipeline step alike where their settings are alike.

    Args:
        scheduler: a diffusers scheduler, which is stepped by its own rule; or the configuration of one, whose noise
            schedule DDIM then uses, because training and evaluation need a step of known density.
        num_inference_steps: number T of denoising steps.
        eta: 0 deterministic … 1 DDPM; None is 0, as in diffusers' pipelines, and other schedulers' own rule.
        noise: of a flow's steps where η > 0: "flow_sde", "dance_sde" or "cps"; None is CPS.
        custom: instead of the number, ``timesteps=[…]`` or ``sigmas=[…]``, for a scheduler's own rule. For a flow
            ``sigmas`` and ``mu`` beside the number, what ``Backbone.schedule_options`` returns.

    Returns:
        :class:`DDIMSolver` for a configuration, a DDIMScheduler or a DDIMParallelScheduler; :class:`FlowSolver` for a
        configuration of flow matching or a FlowMatchEulerDiscreteScheduler; else :class:`DiffusersSolver`.

    Raises:
        ValueError: a number of steps or an eta that the scheduler does not have, or a configuration that neither DDIM
            nor a flow can use (see :class:`DDIMSchedule`, :class:`FlowSchedule`).
    """
    from diffusers import DDIMParallelScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = (
        is_flow(scheduler) if isinstance(scheduler, Mapping) else _steps_as(scheduler, FlowMatchEulerDiscreteScheduler)
    )
    if flow and "timesteps" not in custom:
        return make_flow_solver(scheduler, num_inference_steps, eta, noise, **custom)
    if noise is not None:
        kind = scheduler.get("_class_name") if isinstance(scheduler, Mapping) else type(scheduler).__name__
        raise ValueError(f"noise {noise!r} is of flow matching, and {kind} is not; leave it out for this model")
    if custom:
        return DiffusersSolver(scheduler, num_inference_steps, eta, **custom)
    if isinstance(scheduler, Mapping):
        return DDIMSolver(DDIMSchedule(scheduler, num_inference_steps), 0.0 if eta is None else eta)
    if _steps_as(scheduler, DDIMScheduler, DDIMParallelScheduler):
        return DDIMSolver(DDIMSchedule(whole_config(scheduler), num_inference_steps), 0.0 if eta is None else eta)
    return DiffusersSolver(scheduler, num_inference_steps, eta)


def solver_of(
    backbone: Any, num_inference_steps: int, eta: float, noise: FlowNoise | None = None
) -> DDIMSolver | FlowSolver:
    """The solver of training and evaluation: of a ``Backbone``'s scheduler, for images of its own size.

    Raises:
        ValueError: see :func:`make_solver`, and a scheduler that is not the model's.
    """
    config, options = backbone.scheduler_config, backbone.schedule_options(num_inference_steps)
    return make_solver(config, num_inference_steps, eta, noise=noise, **options)


def takes_eta(scheduler: Any) -> bool:
    """Whether a diffusers scheduler's steps can have noise of strength η: by its own rule, or a flow's by CPS."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = "eta" in inspect.signature(type(scheduler).step).parameters
    return own or _steps_as(scheduler, FlowMatchEulerDiscreteScheduler)


def _steps_as(scheduler: Any, *kinds: Any) -> bool:
    """Whether a scheduler steps by the rule of one of these classes; a subclass with a rule of its own keeps it."""
    return type(scheduler).step in [kind.step for kind in kinds]


def whole_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration with every value as it is, for another scheduler of its class.

    ``from_config`` alone replaces those that were defaults when it was made, even if they were changed since.
    """
    return {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}


def _check_eta(eta: float) -> None:
    if not Number(least=0, most=1).allows(eta):
        raise ValueError(f"eta must lie between 0 (deterministic) and 1 (DDPM), got {eta!r}")


class DDIMSolver:
    """DDIM with any η; its step is a Gaussian with a known density, so it also serves training.

    Args:
        schedule: timesteps and ᾱ.
        eta: 0 deterministic … 1 DDPM.
    """

    def __init__(self, schedule: DDIMSchedule, eta: float) -> None:
        _check_eta(eta)
        self.schedule = schedule
        self.eta = eta
        self.timesteps = schedule.timesteps

    @property
    def trainable(self) -> int:
        """All T steps."""
        return len(self.timesteps)

    def initial(self, noise: Tensor) -> Tensor:
        """x_T of standard normal noise (B, C, h, w): the noise itself."""
        return noise

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The denoiser's input for x_t: x_t itself."""
        return latents

    def gaussian(self, output: Tensor, latents: Tensor, step_index: int | Tensor) -> GaussianStep:
        """The step as a Gaussian; ``step_index`` is one for all rows, or int64 (B,)."""
        return self.schedule.step(output, latents, step_index, self.eta)

    def predicted(self, output: Tensor, latents: Tensor, step_index: int | Tensor) -> Prediction:
        """x̂₀ and ε̂ of a model output, (B, C, h, w) each."""
        alpha, _ = self.schedule.at(step_index, latents)
        return to_prediction(output, latents, alpha, self.schedule.prediction_type)

    def original(self, output: Tensor, latents: Tensor, step_index: int | Tensor, detach: bool = False) -> Tensor:
        """Tweedie's x̂₀ of the latents at a step; ``detach`` treats ε as a constant: ∂x̂₀/∂x_t = 1/√ᾱ_t.

        At ᾱ = 0 the latents are pure noise and that derivative is taken as 0: x̂₀ does not depend on them.
        """
        alpha, _ = self.schedule.at(step_index, latents)
        output = output.to(alpha.dtype)
        if not detach:
            return to_prediction(output, latents, alpha, self.schedule.prediction_type).original
        fixed = latents.detach()
        original = to_prediction(output.detach(), fixed, alpha, self.schedule.prediction_type).original
        return original + (latents - fixed) / torch.where(alpha > 0, alpha, torch.inf).sqrt()

    def noised(self, x0: Tensor, noise: Tensor, step_index: int | Tensor) -> Tensor:
        """x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε at the start of a step (one for all rows, or one per row)."""
        alpha, _ = self.schedule.at(step_index, x0)
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    def stds(self) -> Tensor:
        """σ_t(η) of every step, float64 (T,)."""
        return self.schedule.stds(self.eta)

    def levels(self) -> Tensor:
        """√ᾱ and √(1−ᾱ) at each step's start, and after the last: float64 (T + 1, 2)."""
        alphas = torch.cat([self.schedule.alphas, self.schedule.alphas_next[-1:]])
        return torch.stack([alphas, 1 - alphas], dim=1).sqrt()

    def step(self, output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1) -> Tensor:
        """The next latents (B · copies, C, h, w), float32; η = 0 draws no noise."""
        gaussian = self.gaussian(output, latents, step_index)
        if self.eta == 0:
            return gaussian.mean
        return gaussian.sample(noise(latents.shape[1:], copies))


class DiffusersSolver:
    """Any solver of diffusers' schedulers: DPM-Solver++ (SDE or ODE), Euler-ancestral, TCD and others.

    Args:
        scheduler: a diffusers scheduler; it is copied, so one object can serve many runs.
        num_inference_steps: number T of denoising steps.
        eta: noise of a scheduler whose step takes it (DDIM, TCD, …); None is 0, which diffusers' pipelines pass.
        custom: instead of the number, ``timesteps=[…]`` or ``sigmas=[…]``, which some schedulers take; beside it
            ``mu``, of a dynamic shift.

    Raises:
        ValueError: a number of steps out of range, custom steps that the scheduler does not take, or an eta above 0
            for a scheduler that has none.
    """

    def __init__(
        self, scheduler: Any, num_inference_steps: int | None = None, eta: float | None = None, **custom: Any
    ) -> None:
        kind = type(scheduler)
        self.scheduler = kind.from_config(whole_config(scheduler))
        custom = {name: value for name, value in custom.items() if value is not None}
        refused = [name for name in custom if name not in inspect.signature(self.scheduler.set_timesteps).parameters]
        if refused:
            raise ValueError(f"{kind.__name__} takes no custom {refused[0]}; give num_inference_steps alone")
        counted = not custom.keys() & {"timesteps", "sigmas"}
        if counted:
            trained = int(self.scheduler.config.get("num_train_timesteps", 1000))
            check_num_inference_steps(num_inference_steps, trained)
        self._steps = custom | ({"num_inference_steps": num_inference_steps} if counted else {})
        self.scheduler.set_timesteps(**self._steps)
        self.timesteps: Tensor = self.scheduler.timesteps
        taken = inspect.signature(self.scheduler.step).parameters
        self._takes_generator = "generator" in taken
        eta = 0.0 if eta is None else eta
        _check_eta(eta)
        if eta > 0 and "eta" not in taken:
            raise ValueError(
                f"{kind.__name__} has no eta, got {eta}: it steps by its own rule; leave eta out, or take a scheduler "
                "that has it, such as DDIMScheduler or TCDScheduler"
            )
        self._options = {"eta": eta} if "eta" in taken else {}

    def initial(self, noise: Tensor) -> Tensor:
        """x_T of standard normal noise, scaled by the scheduler; starts a run anew."""
        self.scheduler.set_timesteps(**self._steps)  # forget an earlier run's history
        return noise * float(self.scheduler.init_noise_sigma)

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The denoiser's input for x_t, as the scheduler scales it."""
        return self.scheduler.scale_model_input(latents, self.timesteps[step_index])

    def step(self, output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1) -> Tensor:
        """The next latents; the scheduler draws its noise from the images' generators."""
        extra = self._options | ({"generator": noise.generators} if self._takes_generator else {})
        return self.scheduler.step(output, self.timesteps[step_index], latents, return_dict=False, **extra)[0]
