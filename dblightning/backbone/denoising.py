"""The denoiser of a family with gates and guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import Gating
from dblightning.backbone.base import Backbone, Conditioning
from dblightning.backbone.family import Family


class Denoising(Backbone):
    """The part of :class:`DiffusersBackbone` that denoises."""

    family: Family

    @property
    def lock(self) -> Any:
        """Held while the gates are set for a denoiser call."""
        raise NotImplementedError

    def _denoise(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float, gating: Gating
    ) -> Tensor:
        if guidance_scale > 1 and self.family.guidance == "classifier-free":
            unconditional, conditional = self._both(latents, timesteps, conditioning, guidance_scale, gating)
            return self.guide(unconditional, conditional, guidance_scale, conditioning)
        gating = gating.scaled(conditioning.lora_scale)
        return self._forward(latents, timesteps, conditioning, guidance_scale, gating, len(latents))

    def _both(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        gating: Gating,
    ) -> tuple[Tensor, ...]:
        """The unconditional and the conditional prediction, (R, C, h, w) each."""
        gating = gating.scaled(conditioning.lora_scale).repeated(2)
        twice, times = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        return self._forward(twice, times, conditioning.guided(), guidance_scale, gating, len(latents)).chunk(2)

    def _forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        gating: Gating,
        count: int,
    ) -> Tensor:
        """The denoiser's output, float32; ``count`` of its rows are counted in ``rows_run``."""
        with self.lock:
            self.rows_run += count
            with self.adapters.use(gating):
                return self.family.forward(latents, timesteps, conditioning, guidance_scale).float()

    @property
    def affine_guidance(self) -> bool:  # type: ignore[override]
        return self.family.affine_guidance or self.family.guidance != "classifier-free"

    def passes(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        gates: Gating | Tensor | None = None,
    ) -> Tensor:
        return torch.stack(self._both(latents, timesteps, conditioning, guidance_scale, Gating.of(gates)), dim=1)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, conditioning: Conditioning) -> Tensor:
        return self.family.guide(unconditional, conditional, scale, conditioning)
