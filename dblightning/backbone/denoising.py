"""The denoiser of a family with gates and guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import Gating
from dblightning.backbone.base import Backbone, Conditioning, Gates
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
            passes = self.passes(latents, timesteps, conditioning, guidance_scale, gating)
            return self.guide(passes[:, 0], passes[:, 1], guidance_scale, conditioning)
        with self._ready(gating.scaled(conditioning.lora_scale), len(latents)):
            return self.family.forward(latents, timesteps, conditioning, guidance_scale).float()

    def passes(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float, gates: Gates = None
    ) -> Tensor:
        twice, times = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        gating = Gating.of(gates).scaled(conditioning.lora_scale).repeated(2)
        with self._ready(gating, len(latents)):
            output = self.family.forward(twice, times, conditioning.guided(), guidance_scale).float()
        return output.unflatten(0, (2, len(latents))).transpose(0, 1)

    @contextmanager
    def _ready(self, gating: Gating, rows: int) -> Iterator[None]:
        """The denoiser under these gates, for one call; ``rows`` are counted in ``rows_run``."""
        with self.lock:
            self.rows_run += rows
            with self.adapters.use(gating):
                yield

    @property
    def affine_guidance(self) -> bool:  # type: ignore[override]
        return self.family.affine_guidance or self.family.guidance != "classifier-free"

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, conditioning: Conditioning) -> Tensor:
        return self.family.guide(unconditional, conditional, scale, conditioning)
