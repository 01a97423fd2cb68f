"""The denoiser of a family with gates and guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dblightning.adapters import Gating
from dblightning.backbone.base import Backbone, Conditioning, Gates, one_after_the_other, side_by_side
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
        rows, gating = len(latents), Gating.of(gates).scaled(conditioning.lora_scale)
        both = side_by_side if gating.segments else one_after_the_other
        twice, times = both(latents, latents), both(timesteps, timesteps)
        with self._ready(gating.repeated(2), rows):
            output = self.family.forward(twice, times, conditioning.guided(both), guidance_scale).float()
        return output.unflatten(0, (rows, 2)) if gating.segments else output.unflatten(0, (2, rows)).transpose(0, 1)

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
