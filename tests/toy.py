"""A Gaussian world for the training tests: the base denoiser is exact and the adapter is one shift per step.

Data x₀ ~ N(mean, std²) per dimension, so E[ε | x_t] is linear in x_t. The adapter adds a learned constant to ε.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dblightning.adapters import ATTENTION, Gating
from dblightning.backbone import Backbone, Conditioning

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 100,
    "beta_start": 0.001,
    "beta_end": 0.15,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "clip_sample": False,
}


class ShiftBank:
    """What the training module needs of an adapter bank, for adapters that are one shift per training timestep."""

    merged_limit = 4
    gated_share = 0.0
    target_modules = ATTENTION

    def __init__(self) -> None:
        self.shifts = nn.ParameterDict()
        self.trained: str | None = None

    @property
    def names(self) -> list[str]:
        return list(self.shifts)

    def add(self, name: str, rank: int, lora_alpha: Any, target_modules: Any, seed: int | None) -> None:
        self.shifts[name] = nn.Parameter(torch.zeros(SCHEDULER["num_train_timesteps"]))

    def train_only(self, name: str | Sequence[str] | None) -> None:
        trained = [name] if isinstance(name, str | None) else name
        for key, parameter in self.shifts.items():
            parameter.requires_grad_(key in trained)

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [self.shifts[name]]

    def state_dict(self, name: str) -> dict[str, Tensor]:
        return {"shift": self.shifts[name].detach().clone()}

    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.shifts[name].copy_(state["shift"])


class ExactBackbone(Backbone):
    """A denoiser in closed form, without prompts, guidance or images: :meth:`epsilon` is all that a subclass adds."""

    pooled_dim = 1  # type: ignore[assignment]

    def __init__(self, adapters: Any) -> None:
        super().__init__()
        self.adapters = adapters
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # so that the module has a device

    def encode(self, prompts: Sequence[str], negative_prompt: Any = None) -> Conditioning:
        one = torch.zeros(len(prompts), 1)
        return Conditioning(one, one, one, one)

    def _denoise(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float, gating: Gating
    ) -> Tensor:
        return self.epsilon(latents, timesteps, gating.vectors(len(latents)))

    @abstractmethod
    def epsilon(self, latents: Tensor, timesteps: Tensor, gates: Tensor | None) -> Tensor:
        """ε of R rows with gates (R, m), None for the base model."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class GaussianBackbone(ExactBackbone):
    """The exact denoiser of N(mean, std²) in ``dims`` independent dimensions; "images" are the latents themselves."""

    def __init__(self, dims: int = 1, mean: float = 0.5, std: float = 0.7) -> None:
        super().__init__(ShiftBank())
        from diffusers import DDIMScheduler

        self.dims, self.mean, self.std = dims, mean, std
        self.shifts = self.adapters.shifts  # type: ignore[attr-defined]
        alphas = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod
        self.register_buffer("alphas", alphas)

    scheduler_config: ClassVar[dict[str, Any]] = SCHEDULER  # type: ignore[assignment]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.dims, 1, 1

    def base_epsilon(self, latents: Tensor, alpha: Tensor) -> Tensor:
        """E[ε | x_t] for x_t = √ᾱ x₀ + √(1−ᾱ) ε."""
        variance = alpha * self.std**2 + 1 - alpha
        return (1 - alpha).sqrt() * (latents - alpha.sqrt() * self.mean) / variance

    def epsilon(self, latents: Tensor, timesteps: Tensor, gates: Tensor | None) -> Tensor:
        output = self.base_epsilon(latents, self.alphas[timesteps].view(-1, 1, 1, 1))
        if gates is not None:
            shifts = torch.stack([shift[timesteps] for shift in self.shifts.values()], dim=1)
            output = output + (gates * shifts).sum(1).view(-1, 1, 1, 1)
        return output


FLOW: dict[str, Any] = dict(
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=SCHEDULER["num_train_timesteps"], shift=3.0).config
)


class FlowBackbone(GaussianBackbone):
    """The exact velocity of N(mean, std²) per dimension; the adapter adds a learned constant per step to it."""

    scheduler_config = FLOW  # type: ignore[assignment]
    prediction = "velocity"  # type: ignore[assignment]

    def _denoise(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float, gating: Gating
    ) -> Tensor:
        sigma = (timesteps / FLOW["num_train_timesteps"]).view(-1, 1, 1, 1)
        clean = 1 - sigma
        gain = clean * self.std**2 / (clean.square() * self.std**2 + sigma.square())
        output = (latents - self.mean - gain * (latents - clean * self.mean)) / sigma
        vectors = gating.vectors(len(latents))
        if vectors is not None:
            shifts = torch.stack([shift[timesteps.long() - 1] for shift in self.shifts.values()], dim=1)
            output = output + (vectors * shifts).sum(1).view(-1, 1, 1, 1)
        return output
