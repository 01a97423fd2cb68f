"""Images of a batch of prompts under the adapter in training: rollouts with their trajectories, and plain images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dblightning.backbone import Backbone
from dblightning.batch_size import CudaMeter, largest_batch
from dblightning.blending import Blend, Single
from dblightning.execution import Execution
from dblightning.noise import ImageNoise
from dblightning.precision import computes_in_float32
from dblightning.rollout import Trajectory, rollout
from dblightning.sampling import denoise_loop
from dblightning.solvers import GaussianSolver
from dblightning.training_settings import SamplingSettings
from dblightning.window import WindowedSolver

#: an image of a rollout: the place of the adapter that makes it, and its prompt
Row = tuple[int, str]
#: what is done with a part of a rollout as soon as it is decoded: its images and rows
Take = Callable[[Tensor, list[Row]], None]


def without_nan(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), grey in place of those with a NaN or infinite value; and which were finite, bool (B,)."""
    finite = torch.isfinite(images).flatten(1).all(1)
    return images.where(finite.view(-1, 1, 1, 1), 0.5), finite


class RolloutSampler:
    """Sampling with a run's settings.

    Args:
        backbone: the denoiser.
        solver: of ``num_inference_steps`` steps.
        adapters: names of the adapters in training.
        settings: of sampling.
        seed: of the run; an image's noise is of it, the prompt and the image's own seed.
        inform: is given what is worth saying about a run, once.
        keep_means: store the mean of every step's Gaussian too.
        rollout_adapters: the adapters that rollouts are sampled with; None: those in training.
        evaluation: solver of the validation's images; None: the same.
        final_only: keep the final latents of rollouts alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        solver: GaussianSolver,
        adapters: Sequence[str],
        settings: SamplingSettings,
        seed: int,
        inform: Callable[[str], None] = print,
        keep_means: bool = False,
        rollout_adapters: Sequence[str] | None = None,
        evaluation: GaussianSolver | None = None,
        final_only: bool = False,
    ) -> None:
        self.backbone = backbone
        self.solver = solver
        self.evaluation = evaluation or solver
        self.adapters = list(adapters)
        self.settings = settings
        self.seed = seed
        self.inform = inform
        self.keep_means = keep_means
        self.final_only = final_only
        self.rollout_adapters = list(rollout_adapters or adapters)
        self._fitting: int | None = None  # images that fit into memory at once, where requested

    def rollout(
        self,
        batch: dict[str, Any],
        device: torch.device,
        take: Take | None = None,
        window: WindowedSolver | None = None,
    ) -> tuple[Trajectory, Tensor]:
        """Trajectory and images (m · B, 3, H, W) of the batch's B prompts with each of m adapters, one after the other.

        All adapters see the same noise, so each makes what it would make alone. A sample with a NaN or infinite value
        is a grey image, and its log-probs are NaN.

        Args:
            batch: prompts, their ids and the images' seeds.
            device: of the backbone.
            take: see ``Take``.
            window: of stochastic steps; None: all are.
        """
        rows = self.rows(batch)
        prompts = [prompt for _, prompt in rows]
        prompt_ids, seeds = (batch[name].repeat(len(self.adapters)) for name in ("prompt_id", "seed"))
        size = self.images_at_once(prompts, device)
        parts, images = [], []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            noise = self._noise(prompt_ids[part], seeds[part], device, "training")
            trajectory, decoded = self._part(rows[part], noise, device, window)
            parts.append(trajectory)
            images.append(decoded)
            if take is not None:
                take(decoded, rows[part])
        return Trajectory.joined(parts), torch.cat(images)

    def rows(self, batch: dict[str, Any]) -> list[Row]:
        """A rollout's images, in order."""
        return [(place, prompt) for place in range(len(self.adapters)) for prompt in batch["prompt"]]

    def _part(
        self, rows: list[Row], noise: ImageNoise, device: torch.device, window: WindowedSolver | None
    ) -> tuple[Trajectory, Tensor]:
        places = {place for place, _ in rows}
        one = self.rollout_adapters[places.pop()] if len(places) == 1 else None
        trajectory = rollout(
            self.backbone,
            self.backbone.encode([prompt for _, prompt in rows], self.settings.negative_prompt),
            self.solver,
            Single(one or [self.rollout_adapters[place] for place, _ in rows]),
            noise,
            self.settings.guidance_scale,
            self.execution(device),
            window,
            self.keep_means,
            self.final_only,
        )
        images, finite = without_nan(self.backbone.decode(trajectory.image))
        finite &= torch.isfinite(trajectory.latents).transpose(0, 1).flatten(1).all(1)
        # a sample that is not finite has no density either, which is how it is known later
        return trajectory._replace(log_probs=trajectory.log_probs.where(finite, torch.nan)), images

    @torch.no_grad()
    def generate(
        self, prompts: list[str], prompt_ids: Tensor, seeds: Tensor, blend: Blend | None, device: torch.device
    ) -> Tensor:
        """Images (B, 3, H, W) with an evaluation's noise, never a rollout's; ``blend`` None is the (first) adapter."""
        guidance = self.settings.eval_guidance_scale
        latents = denoise_loop(
            self.backbone,
            self.backbone.encode(prompts, self.settings.negative_prompt),
            self.evaluation,
            blend or Single(self.adapters[0]),
            self._noise(prompt_ids, seeds, device, "evaluation"),
            guidance_scale=self.settings.guidance_scale if guidance is None else guidance,
        )
        return self.backbone.decode(latents)

    def execution(self, device: torch.device) -> Execution:
        """The execution of a rollout."""
        if self.settings.execution != "auto":
            return self.settings.execution
        # rounded to TF32, W + ΔW is another matrix than W and ΔW apart, which the update multiplies by
        return "merged" if computes_in_float32(self.backbone, device) else "gated"

    def images_at_once(self, prompts: list[str], device: torch.device) -> int:
        """``rollout_batch_size`` in images."""
        size = self.settings.rollout_batch_size
        if size != "auto":
            return int(size or len(prompts))
        if self._fitting is None:
            if device.type != "cuda":
                return len(prompts)
            self._fitting = largest_batch(
                lambda count: self._try(prompts[:count], device), len(prompts), CudaMeter(device)
            )
            self.inform(f"rollout_batch_size: {self._fitting} images fit at once")
        return self._fitting

    def _try(self, prompts: list[str], device: torch.device) -> None:
        """The two calls of a rollout that need most memory, for so many images: one of the denoiser, and decoding."""
        latents = torch.zeros(len(prompts), *self.backbone.latent_shape, device=device)
        timesteps = self.solver.timesteps[:1].to(device).expand(len(prompts))
        gates = torch.ones(len(prompts), len(self.backbone.adapters.names), device=device)
        conditioning = self.backbone.encode(prompts, self.settings.negative_prompt)
        self.backbone.denoise(latents, timesteps, conditioning, self.settings.guidance_scale, gates=gates)
        self.backbone.decode(latents)

    def _noise(self, prompt_ids: Tensor, seeds: Tensor, device: torch.device, stream: str) -> ImageNoise:
        return ImageNoise.of(self.seed, prompt_ids.tolist(), seeds.tolist(), device, stream)
