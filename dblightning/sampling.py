"""The one denoising loop: every method, every rollout and every generation goes through it."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from dblightning.backbone import Backbone, Conditioning
from dblightning.blending import BatchWeights, Blend, BlendPlan, BlendStep, construct
from dblightning.noise import ImageNoise
from dblightning.schedule import gaussian_log_prob
from dblightning.solvers import GaussianSolver, Solver

Execution = Literal["auto", "gated", "merged"]


class Trajectory(NamedTuple):
    """One rollout of B images over T steps, float32."""

    latents: Tensor  # (T + 1, B, C, h, w), from noise to image
    log_probs: Tensor  # (T, B), of latents[t + 1] given latents[t]; mean over C, h, w


class Call(NamedTuple):
    """One call of the denoiser: some rows of the flattened (K, B)."""

    rows: Tensor  # int64 (r,), k · B + b
    images: Tensor | None  # int64 (r,), b; None: every image, in order
    gates: Tensor | None  # (r, m); None: no gates
    merged: tuple[float, ...] | None  # the gate vector to run on merged weights


class Calls(NamedTuple):
    """How a blend step is executed, on the latents' device."""

    calls: list[Call]
    mix: Tensor | None  # (K, B); None: one row per image, unscaled
    factors: bool


#: on the CPU, images per gate vector from which merged weights beat one gated batch (measured on the miniature, where
#: the gated layer weighs most; see docs/methods.md)
MERGED_GROUP = 16


def arrange(
    blend: BlendStep,
    device: torch.device,
    execution: Execution = "auto",
    max_rows: int | None = None,
    merged_limit: int = 4,
) -> Calls:
    """Split a blend step into denoiser calls: only rows whose mix is not zero are computed.

    Args:
        blend: gates and mix, on the CPU.
        device: where the latents are.
        execution: "gated" runs all rows in one batch; "merged" runs the rows of each gate vector on merged weights;
            "auto" takes merged where all rows share one gate vector (and, on the CPU, where each vector has at least
            16 rows and all merged copies fit), else gated. Gradients to the adapters need "gated".
        max_rows: rows per denoiser call, before guidance doubles them; None is no limit. A run that is out of memory
            halves it and tries again.
        merged_limit: merged copies that may be kept.
    """
    needed = (blend.mix != 0).any(1)
    gates, mix = blend.gates[needed], blend.mix[needed]
    batch = mix.shape[1]
    row_of, image_of = (mix != 0).nonzero(as_tuple=True)
    vectors = gates[row_of, image_of]  # (R, m)
    unique, which, counts = _distinct(vectors)
    if execution == "auto":
        large = device.type == "cpu" and int(counts.min()) >= MERGED_GROUP
        fits = int((unique != 0).any(1).sum()) <= merged_limit
        execution = "merged" if len(unique) == 1 or (large and fits) else "gated"
    if execution == "merged":
        vectors_used: list[tuple[float, ...] | None] = [tuple(vector.tolist()) for vector in unique]
        groups = [(which == each).nonzero().flatten() for each in range(len(unique))]
    else:
        vectors_used, groups = [None], [torch.arange(len(row_of))]
    calls = []
    for group, vector in zip(groups, vectors_used, strict=True):
        for part in group.split(max_rows or len(group)):
            images = image_of[part]
            in_order = len(part) == batch and bool((images == torch.arange(batch)).all())
            gated = vector is None and bool(vectors[part].any())
            calls.append(
                Call(
                    (row_of[part] * batch + images).to(device),
                    None if in_order else images.to(device),
                    vectors[part].to(device) if gated else None,
                    vector,
                )
            )
    plain = mix.shape[0] == 1 and bool((mix == 1).all())
    return Calls(calls, None if plain else mix.to(device), blend.factors)


def _distinct(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows of (R, m), the index of each row's, and how often each occurs."""
    if vectors.shape[1] == 0:  # no adapters
        count = len(vectors)
        return vectors[:1], torch.zeros(count, dtype=torch.int64), torch.tensor([count])
    return torch.unique(vectors, dim=0, return_inverse=True, return_counts=True)


def predict(
    backbone: Backbone,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    calls: Calls,
    guidance_scale: float,
) -> Tensor:
    """The blended prediction of B images, Σ_k mix[k, b] · ε(x_b, t, c_b ; gates[k, b]).

    Args:
        latents: (B, C, h, w), as the denoiser wants them.
        timesteps: int64 (B,).
        conditioning: B rows.
        calls: of :func:`arrange`.
        guidance_scale: classifier-free guidance; 1 off. Applied per row, which equals applying it to the mix.

    Returns:
        (B, C, h, w), float32.
    """
    outputs = [
        backbone.denoise(
            latents if call.images is None else latents[call.images],
            timesteps if call.images is None else timesteps[call.images],
            conditioning if call.images is None else conditioning.rows(call.images),
            guidance_scale,
            gates=call.gates,
            factors=calls.factors,
            merged=call.merged,
        )
        for call in calls.calls
    ]
    if calls.mix is None and len(outputs) == 1:
        return outputs[0]
    output = torch.cat(outputs)
    # scattered to (K, B) and summed over K, not index_add: atomics would make a GPU's sum depend on its order
    height = 1 if calls.mix is None else len(calls.mix)
    rows = torch.zeros(height * len(latents), *output.shape[1:], dtype=output.dtype, device=output.device)
    rows = rows.index_copy(0, torch.cat([call.rows for call in calls.calls]), output)
    if calls.mix is None:
        return rows
    shape = (height, len(latents), *[1] * (output.ndim - 1))
    return (calls.mix.to(output.dtype).view(shape) * rows.unflatten(0, shape[:2])).sum(0)


@dataclass
class Run:
    """One walk from noise to latents: what every step needs to know."""

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

    def __post_init__(self) -> None:
        if self.execution not in ("auto", "gated", "merged"):
            raise ValueError(f"execution must be auto, gated or merged, got {self.execution!r}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, or None for no limit, got {self.max_rows}")
        if self.execution == "auto" and not self._vectors_last():
            self.execution = "gated"  # merging anew at every step costs more than gating

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return len(self.conditioning.prompt_embeds)

    @property
    def num_steps(self) -> int:
        return len(self.solver.timesteps)

    def _vectors_last(self) -> bool:
        vectors: set[bytes] = set()
        for step_index in range(self.num_steps):
            gates, mix, _ = self.plan(step_index)
            distinct, _, _ = _distinct(gates[mix != 0])
            vectors |= {vector.numpy().tobytes() for vector in distinct if vector.any()}  # the base needs no copy
        return len(vectors) <= self.backbone.adapters.merged_limit

    def images(self, part: slice) -> Run:
        """The same run for some of its images."""
        index = torch.arange(self.batch)[part]
        if len(index) == self.batch:
            return self

        def plan(step_index: int) -> BlendStep:
            gates, mix, factors = self.plan(step_index)
            return BlendStep(gates[:, index], mix[:, index], factors)

        prompts = None if self.prompts is None else self.prompts[part]
        return replace(
            self, conditioning=self.conditioning.rows(index), plan=plan, prompts=prompts, _arranged={}, _copied={}
        )

    def changed(self, state: State, change: Change | None) -> State:
        """The state to go on from; a prediction made ahead is dropped when what it was made of has changed."""
        if change is None:
            return state
        if change.conditioning is not None:
            self.conditioning = change.conditioning
            self._copied.clear()
            state = State(state.latents)
        if change.guidance_scale is not None:
            self.guidance_scale = change.guidance_scale
            state = State(state.latents)
        if change.latents is not None and change.latents is not state.latents:
            state = State(change.latents.to(state.latents.dtype))
        return state

    def predict(self, latents: Tensor, step_index: int) -> Tensor:
        """The blended prediction for B · copies rows, an image's copies side by side: float32, latents' shape."""
        copies = len(latents) // self.batch
        scaled = self.solver.scale(latents, step_index)
        timesteps = self.solver.timesteps[step_index].to(latents.device).expand(len(latents))
        while True:
            calls = self._calls(self.plan(step_index), copies, latents.device)
            largest = max(len(call.rows) for call in calls.calls)
            try:
                return predict(self.backbone, scaled, timesteps, self._rows(copies), calls, self.guidance_scale)
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
        key = (blend.gates.numpy().tobytes(), blend.mix.numpy().tobytes(), copies, execution)
        if key not in self._arranged:
            many = BlendStep(
                blend.gates.repeat_interleave(copies, 1), blend.mix.repeat_interleave(copies, 1), blend.factors
            )
            limit = self.backbone.adapters.merged_limit
            self._arranged[key] = arrange(many, device, execution, self.max_rows, limit)
        return self._arranged[key]

    def _rows(self, copies: int) -> Conditioning:
        if copies == 1:
            return self.conditioning
        if copies not in self._copied:
            self._copied[copies] = self.conditioning.rows(torch.arange(self.batch).repeat_interleave(copies))
        return self._copied[copies]


class State(NamedTuple):
    """Where the walk stands before a step."""

    latents: Tensor  # (B · copies, C, h, w), an image's copies side by side
    output: Tensor | None = None  # the prediction for these latents, where a look-ahead has made it already


class Steering(ABC):
    """What modifies the steps of a trajectory. It wraps the step; who predicts stays the blend's business.

    A steering of your own is a subclass in any module, named by its dotted path like a blend.
    """

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

    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        output = run.predict(state.latents, step_index)
        return output, State(run.solver.step(output, state.latents, step_index, run.noise))


class Change(NamedTuple):
    """What a callback changes for the steps to come; None leaves a thing as it is."""

    latents: Tensor | None = None  # shape of the next latents
    conditioning: Conditioning | None = None  # B rows
    guidance_scale: float | None = None


#: called after each step with (step_index, latents, model output, next latents); may return latents to go on with, or
#: a :class:`Change`
OnStep = Callable[[int, Tensor, Tensor, Tensor], Tensor | Change | None]


def denoise_loop(
    backbone: Backbone,
    conditioning: Conditioning,
    solver: Solver,
    blend: Blend,
    noise: ImageNoise,
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
        execution, max_rows: see :func:`arrange`.
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
    steering = steering or Unsteered()
    steering.start(run)
    first = noise(backbone.latent_shape) if latents is None else latents.to(_at_least_float32(latents))
    state = State(solver.initial(first))
    for step_index in range(run.num_steps):
        before = state.latents
        output, state = steering.step(run, step_index, state)
        if on_step is not None:
            change = on_step(step_index, before, output, state.latents)
            state = run.changed(state, Change(latents=change) if isinstance(change, Tensor) else change)
    return state.latents


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


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
    walk: list[Tensor] = []
    log_probs: list[Tensor] = []

    def record(step_index: int, latents: Tensor, output: Tensor, next_latents: Tensor) -> None:
        walk.append(latents)
        log_probs.append(gaussian_log_prob(solver.gaussian(output, latents, step_index), next_latents))

    last = denoise_loop(
        backbone, conditioning, solver, blend, noise, guidance_scale, execution=execution, on_step=record
    )
    return Trajectory(torch.stack([*walk, last]), torch.stack(log_probs))
