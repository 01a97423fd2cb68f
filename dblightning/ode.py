"""The deterministic way from noise to image: the probability-flow ODE by DPM-Solver++(2M), in its x̂₀ form."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Level(NamedTuple):
    """A noise level: x = signal · x₀ + noise · ε."""

    signal: float  # α: √ᾱ of a diffusion model, 1 − σ of a flow model; >= 0
    noise: float  # σ: √(1−ᾱ), or the flow's own; >= 0

    @property
    def log_ratio(self) -> float:
        """λ = log(α/σ), half the log-SNR; infinite at pure noise (−) and at the image (+)."""
        if self.signal <= 0:
            return -math.inf
        return math.inf if self.noise <= 0 else math.log(self.signal / self.noise)


class MultistepODE:
    """Steps of DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2), of any schedule of α and σ.

    x' = (σ'/σ) x + (α' − α σ'/σ) D with D = x̂₀ + (x̂₀ − x̂₀ᵖʳᵉᵛ)/(2r), r = (λ − λᵖʳᵉᵛ)/(λ' − λ). Without a previous step
    D = x̂₀, which is DDIM at η = 0, and Euler's step of a flow model.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, Level] | None = None

    def forget(self) -> None:
        """Begin anew: the latents were moved by something else, or are another run's."""
        self._previous = None

    def step(self, original: Tensor, latents: Tensor, start: Level, end: Level, last: bool = False) -> Tensor:
        """The next latents.

        Args:
            original: x̂₀ of the latents, (B, C, h, w).
            latents: x at ``start``, (B, C, h, w).
            start, end: noise levels; ``start`` has noise.
            last: it leads to the image: of first order, as a long step extrapolates badly (diffusers'
                ``lower_order_final``).
        """
        data = original
        width = end.log_ratio - start.log_ratio
        if self._previous is not None and not last and math.isfinite(width):
            earlier, before = self._previous
            ratio = (start.log_ratio - before.log_ratio) / width
            data = original + (original - earlier) / (2 * ratio)
        self._previous = original, start
        kept = end.noise / start.noise
        return kept * latents + (end.signal - start.signal * kept) * data
