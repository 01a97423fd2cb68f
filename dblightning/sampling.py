"""The one denoising loop: every method, every rollout and every generation goes through it."""

from __future__ import annotations

import importlib
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dblightning.backbone import Backbone, Conditioning
from dblightning.blending import Blend, BlendPlan, BlendStep, PartialStep
from dblightning.execution import (
    MERGED_GROUP,
    Call,
    Calls,
    Execution,
    arrange,
    check_execution,
    count_vectors,
    predict,
)
from dblightning.kept_outputs import KeptOutputs
from dblightning.methods import construct
from dblightning.noise import ImageNoise
from dblightning.solvers import Solver
from dblightning.weights import BatchWeights

# the names of :mod:`execution` and :mod:`rollout` are here too, where they were at first
__all__ = [
    "MERGED_GROUP",
    "Call",
    "Calls",
    "Change",
    "Execution",
    "OnStep",
    "Run",
    "State",
    "Steering",
    "StepRecord",
    "Unsteered",
    "arrange",
    "denoise_loop",
    "predict",
]


def __getattr__(name: str) -> Any:
    """``Trajectory`` and ``rollout``, from the module above that now holds them."""
    if name in ("Trajectory", "rollout"):
        return getattr(importlib.import_module("dblightning.rollout"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class Run:
    """One run from noise to latents: what every step needs to know."""

    backbone: Backbone
    conditioning: Conditioning  # B rows
    solver: Solver
    plan: BlendPlan
    noise: ImageNoise
    guidance_scale: float
    execution: Execution = "auto"
    max_rows: int | None = None
    prompts: list[str] | None = None  # for steering, which scores images
    _arranged: dict[tuple[Any, ...], Calls] = field(default_factory=dict)
    _copied: dict[int, Conditioning] = field(default_factory=dict)
    _kept: KeptOutputs | None = field(default=None, init=False)  # of a blend that does not compute all its rows

    def __post_init__(self) -> None:
        check_execution(self.execution, self.max_rows)
        if any(isinstance(self.plan(step_index), PartialStep) for step_index in range(self.num_steps)):
            self._kept = KeptOutputs()
        limit = self.backbone.adapters.merged_limit
        if self.execution == "auto" and count_vectors(self.plan, self.num_steps) > limit:
            self.execution = "gated"  # merging anew at every step costs more than gating

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return len(self.conditioning.prompt_embeds)

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.solver.timesteps)

    @property
    def keeps_outputs(self) -> bool:
        """Whether steps take outputs of earlier ones, so that they have to be predicted once each and in order."""
        return self._kept is not None

    def images(self, part: slice) -> Run:
        """The same run for some of its images."""
        index = torch.arange(self.batch)[part]
        if len(index) == self.batch:
            return self

        def plan(step_index: int) -> BlendStep:
            step = self.plan(step_index)
            part = BlendStep(step.gates[:, index], step.mix[:, index], step.factors)
            return PartialStep.of(part, step.now[:, index]) if isinstance(step, PartialStep) else part

        prompts = None if self.prompts is None else self.prompts[part]
        return replace(
            self, conditioning=self.conditioning.rows(index), plan=plan, prompts=prompts, _arranged={}, _copied={}
        )

    def changed(self, state: State, change: Change | None) -> State:
        """The state to continue from; a prediction made ahead is dropped when what it was made of has changed."""
        if change is None:
            return state
        if change.conditioning is not None:
            self.conditioning = change.conditioning
            self._copied.clear()
        if change.guidance_scale is not None:
            self.guidance_scale = change.guidance_scale
        if change.conditioning is not None or change.guidance_scale is not None:
            state = State(state.latents)
            if self._kept is not None:
                self._kept.drop()
        if change.latents is not None and change.latents is not state.latents:
            state = State(change.latents.to(state.latents.dtype))
        return state

    def predict(self, latents: Tensor, step_index: int) -> Tensor:
        """The blended prediction for B · copies rows, an image's copies side by side: float32, latents' shape."""
        copies = len(latents) // self.batch
        scaled = self.solver.scale(latents, step_index)
        timesteps = self.solver.timesteps[step_index].to(latents.device).expand(len(latents))
        step, recalled = self.plan(step_index), None
        if self._kept is not None:
            step, recalled = self._kept.split(step)
        while True:
            calls = self._calls(step, copies, latents.device)
            largest = max(len(call.rows) for call in calls.calls)
            try:
                rows = self._rows(copies)
                return predict(self.backbone, scaled, timesteps, rows, calls, self.guidance_scale, recalled)
            except torch.OutOfMemoryError:
                if largest == 1:
                    raise
            # outside the except block: the exception no longer keeps the failed call's activations alive
            self.max_rows = largest // 2
            self._arranged.clear()
            warnings.warn(f"out of memory on {largest} rows: max_rows is now {self.max_rows}", stacklevel=2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _calls(self, blend: BlendStep, copies: int, device: torch.device) -> Calls:
        # most plans repeat a few steps; a run's device copies are made once
        execution = "gated" if torch.is_grad_enabled() else self.execution
        key = (blend.gates.numpy().tobytes(), blend.mix.numpy().tobytes(), blend.factors, copies, execution)
        if key not in self._arranged:
            many = BlendStep(
                blend.gates.repeat_interleave(copies, 1), blend.mix.repeat_interleave(copies, 1), blend.factors
            )
            bank = self.backbone.adapters
            self._arranged[key] = arrange(many, device, execution, self.max_rows, bank.merged_limit, bank.gated_share)
        return self._arranged[key]

    def _rows(self, copies: int) -> Conditioning:
        if copies == 1:
            return self.conditioning
        if copies not in self._copied:
            self._copied[copies] = self.conditioning.rows(torch.arange(self.batch).repeat_interleave(copies))
        return self._copied[copies]


class State(NamedTuple):
    """State of a run before a step."""

    latents: Tensor  # (B · copies, C, h, w), an image's copies side by side
    output: Tensor | None = None  # the prediction for these latents, where a look-ahead has made it already
    shift: Tensor | None = None  # what a steering added to the mean of the step that led here, of latents' shape


class Steering(ABC):
    """Base class for what modifies the steps of a trajectory. It wraps the step; the blend still predicts.

    A steering of your own is a subclass in any module, named by its dotted path like a blend.
    """

    #: why its steps have no KL to the base model's; None where each is the solver's Gaussian, its mean moved by
    #: ``State.shift``
    no_kl: ClassVar[str | None] = "its steps are not known to be Gaussians"

    @classmethod
    def from_preference(
        cls,
        rewards: Mapping[str, Any] | None = None,
        weights: BatchWeights | None = None,
        normalize: bool = False,
        **options: Any,
    ) -> Self:
        """The steering of a preference; the constructor gets what it names of these, and the options.

        Args:
            rewards: name → reward, those there are; a class that names none goes without.
            weights: reward → weight, one mapping or one per image.
            normalize: divide weights by their sum.
            options: the class's further arguments.

        Raises:
            ValueError: what the class lacks or needs.
        """
        given = {"rewards": rewards or None, "weights": weights or None, "normalize": normalize or None}
        if "rewards" not in inspect.signature(cls).parameters:
            given["rewards"] = None
        return construct(cls, given, options)

    def start(self, run: Run) -> None:  # noqa: B027 (optional)
        """Check settings and prepare, before the first denoiser call.

        Raises:
            ValueError: settings that do not fit the run.
        """

    @abstractmethod
    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        """One step.

        Returns:
            The model output it took, for B · copies rows, and the state after it.
        """


class Unsteered(Steering):
    """Predict, then let the solver step."""

    no_kl = None

    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        output = run.predict(state.latents, step_index)
        return output, State(run.solver.step(output, state.latents, step_index, run.noise))


class Change(NamedTuple):
    """Changes a callback makes for the steps to come; None leaves a thing as it is."""

    latents: Tensor | None = None  # shape of the next latents
    conditioning: Conditioning | None = None  # B rows
    guidance_scale: float | None = None


class StepRecord(NamedTuple):
    """One step that was taken, for B images (B · copies rows while a steering searches)."""

    step_index: int
    timestep: Tensor  # the scheduler's, ()
    latents: Tensor  # before the step
    output: Tensor  # the model output it took, of latents' shape
    next_latents: Tensor
    shift: Tensor | None = None  # what a steering added to the step's mean


#: called after each step; may return latents to continue with, or a :class:`Change`
OnStep = Callable[[StepRecord], Tensor | Change | None]


def denoise_loop(
    backbone: Backbone,
    conditioning: Conditioning,
    solver: Solver,
    blend: Blend,
    noise: ImageNoise,
    *,
    guidance_scale: float = 7.5,
    latents: Tensor | None = None,
    execution: Execution = "auto",
    max_rows: int | None = None,
    on_step: OnStep | None = None,
    steering: Steering | None = None,
    prompts: Sequence[str] | None = None,
) -> Tensor:
    """Denoise from noise to latents ready for decoding.

    Args:
        backbone: denoiser and adapters.
        conditioning: B rows.
        solver: DDIM or another.
        blend: who predicts.
        noise: one generator per image.
        guidance_scale: classifier-free guidance; 1 off.
        latents: initial standard normal latents (B, C, h, w); None draws them from ``noise``.
        execution, max_rows: see :func:`dblightning.execution.arrange`.
        on_step: see :data:`OnStep`.
        steering: CoDe or RGG; None takes plain steps.
        prompts: B texts, which steering scores images against.

    Returns:
        Latents (B, C, h, w), float32 (float64 in, float64 out).

    Raises:
        ValueError: settings that do not fit, before the first denoiser call.
    """
    batch = len(conditioning.prompt_embeds)
    plan = blend.start(backbone.adapters.names, batch, len(solver.timesteps), noise.draws)
    run = Run(
        backbone,
        conditioning,
        solver,
        plan,
        noise,
        guidance_scale,
        execution,
        max_rows,
        None if prompts is None else list(prompts),
    )
    if steering is not None and run.keeps_outputs:
        raise ValueError(
            f"{type(blend).__name__} takes outputs of earlier steps, which a {type(steering).__name__} cannot follow; "
            "compute every row at every step (full_share 1)"
        )
    steering = steering or Unsteered()
    steering.start(run)
    if latents is None:
        latents = noise(backbone.latent_shape_of(conditioning.size))
    state = State(solver.initial(latents.to(_at_least_float32(latents))))
    for step_index in range(run.num_steps):
        before = state.latents
        output, state = steering.step(run, step_index, state)
        if on_step is not None:
            timestep = solver.timesteps[step_index]
            record = StepRecord(step_index, timestep, before, output, state.latents, state.shift)
            change = on_step(record)
            state = run.changed(state, Change(latents=change) if isinstance(change, Tensor) else change)
    return state.latents


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
