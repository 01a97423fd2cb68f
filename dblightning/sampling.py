"""The one denoising loop: every method, every rollout and every generation goes through it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dblightning.backbone import Backbone, Conditioning
from dblightning.blending import Blend, BlendStep
from dblightning.schedule import DDIMSchedule, GaussianStep, gaussian_log_prob

Execution = Literal["auto", "gated", "merged"]


def image_seed(run_seed: int, prompt_id: int, seed: int, stream: str = "noise") -> int:
    """A 63-bit generator seed for one image and one purpose.

    It depends on nothing else, so an image is the same whatever the batch, the number of devices or the method it is
    compared with (common random numbers).
    """
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ImageNoise:
    """Standard normal noise and the draws of stochastic blends, from one CPU generator per image.

    Args:
        seeds: one generator seed per image.
        device: where the noise is wanted.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # apart from the noise, so that a method that draws sees the same noise as one that does not
        self.draws = [torch.Generator().manual_seed(image_seed(seed, 0, 0, "draws")) for seed in seeds]
        self.device = torch.device(device)

    @classmethod
    def of(
        cls,
        run_seed: int,
        prompt_ids: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        stream: str = "noise",
    ) -> ImageNoise:
        """Noise of the images (prompt_id, seed) of one run; ``stream`` tells its uses apart (training, evaluation)."""
        keys = zip(prompt_ids, seeds, strict=True)
        return cls([image_seed(run_seed, prompt_id, seed, stream) for prompt_id, seed in keys], device)

    def __len__(self) -> int:
        return len(self.generators)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next noise, float32 (B, *shape)."""
        noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self.generators])
        return noise.to(self.device, non_blocking=True)


class Solver(Protocol):
    """What turns predictions into the next latents."""

    timesteps: Tensor

    def initial(self, noise: Tensor) -> Tensor:
        """The first latents from standard normal noise."""
        ...

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The latents as the denoiser wants them."""
        ...

    def step(self, model_output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise) -> Tensor:
        """The next latents."""
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

    def step(self, model_output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise) -> Tensor:
        gaussian = self.gaussian(model_output, latents, step_index)
        if self.eta == 0:
            return gaussian.mean
        return gaussian.sample(noise(latents.shape[1:]))


class DiffusersSolver:
    """Any solver of diffusers' schedulers: DPM-Solver++ (SDE or ODE), Euler-ancestral, …

    Args:
        scheduler: a diffusers scheduler; it is copied, so one object can serve many runs.
        num_inference_steps: number T of denoising steps.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int) -> None:
        self.scheduler = type(scheduler).from_config(scheduler.config)
        self.scheduler.set_timesteps(num_inference_steps)
        self.timesteps: Tensor = self.scheduler.timesteps

    def initial(self, noise: Tensor) -> Tensor:
        return noise * float(self.scheduler.init_noise_sigma)

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        return self.scheduler.scale_model_input(latents, self.timesteps[step_index])

    def step(self, model_output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise) -> Tensor:
        import inspect

        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": noise.generators} if takes_generator else {}
        return self.scheduler.step(model_output, self.timesteps[step_index], latents, return_dict=False, **extra)[0]


class Trajectory(NamedTuple):
    """One rollout of B images over T steps, float32."""

    latents: Tensor  # (T + 1, B, C, h, w), from noise to image
    log_probs: Tensor  # (T, B), of latents[t + 1] given latents[t]; mean over C, h, w


def predict(
    backbone: Backbone,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    blend: BlendStep,
    guidance_scale: float,
    execution: Execution = "auto",
    max_rows: int | None = None,
) -> Tensor:
    """The blended prediction of B images, at the price of the rows whose mix is not zero.

    Args:
        latents: (B, C, h, w), as the denoiser wants them.
        timesteps: int64 (B,).
        conditioning: B rows.
        blend: gates and mix, on the CPU.
        guidance_scale: classifier-free guidance; 1 off. Applied per row, which equals applying it to the mix.
        execution: "gated" runs all rows in one batch; "merged" runs the rows of each gate vector on merged weights;
            "auto" takes merged where all rows share a gate vector, and for mixed rows on the CPU.
        max_rows: rows per denoiser call; None is no limit.

    Returns:
        (B, C, h, w), float32.
    """
    gates, mix, factors = blend
    used = mix != 0
    row_of, image_of = used.nonzero(as_tuple=True)
    vectors = gates[row_of, image_of]  # (R, m)
    if vectors.shape[1]:
        unique, which = torch.unique(vectors, dim=0, return_inverse=True)
    else:  # no adapter is loaded: all rows are the base model
        unique, which = vectors[:1], torch.zeros(len(vectors), dtype=torch.long)
    mixed = int((unique != 0).any(1).sum())
    if execution == "auto":
        few = mixed <= backbone.adapters.merged_limit
        fits = len(unique) == 1 or (latents.device.type == "cpu" and few)
        execution = "merged" if fits and not torch.is_grad_enabled() else "gated"
    if execution == "merged":
        groups = [((which == each).nonzero().flatten(), unique[each].tolist()) for each in range(len(unique))]
    else:
        groups = [(torch.arange(len(row_of)), None)]
    coefficients = mix[row_of, image_of].to(latents.device).view(-1, 1, 1, 1)
    alone = len(row_of) == len(latents) and bool((image_of == torch.arange(len(latents))).all())
    total = torch.zeros_like(latents, dtype=torch.float32)
    for group, vector in groups:
        for rows in group.split(max_rows or len(group)):
            everything = alone and len(rows) == len(latents)
            images = image_of[rows].to(latents.device)
            output = backbone.denoise(
                latents if everything else latents[images],
                timesteps if everything else timesteps[images],
                conditioning if everything else conditioning.rows(images),
                guidance_scale,
                gates=_row_gates(vectors[rows], latents.device) if vector is None else None,
                factors=factors,
                merged=vector,
            )
            if everything and bool((mix[used] == 1).all()):
                return output
            total = total.index_add(0, images, output * coefficients[rows.to(latents.device)])
    return total


def _row_gates(vectors: Tensor, device: torch.device) -> Tensor | None:
    return vectors.to(device, non_blocking=True) if bool(vectors.any()) else None


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
    on_step: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
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
        execution, max_rows: see :func:`predict`.
        on_step: called after each step with (step_index, latents, model output, next latents).

    Returns:
        Latents (B, C, h, w), float32.
    """
    batch = len(conditioning.prompt_embeds)
    num_steps = len(solver.timesteps)
    plan = blend.start(backbone.adapters.names, batch, num_steps, noise.draws)
    latents = solver.initial(noise(backbone.latent_shape) if latents is None else latents.float())
    for step_index in range(num_steps):
        timesteps = solver.timesteps[step_index].to(latents.device).expand(batch)
        output = predict(
            backbone,
            solver.scale(latents, step_index),
            timesteps,
            conditioning,
            plan(step_index),
            guidance_scale,
            execution,
            max_rows,
        )
        next_latents = solver.step(output, latents, step_index, noise)
        if on_step is not None:
            on_step(step_index, latents, output, next_latents)
        latents = next_latents
    return latents


@torch.no_grad()
def rollout(
    backbone: Backbone,
    conditioning: Conditioning,
    solver: DDIMSolver,
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
    stds = solver.schedule.stds(solver.eta)
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
