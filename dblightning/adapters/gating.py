"""Which adapters a denoiser call runs, as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive rows of a denoiser call that share one gate vector."""

    vector: tuple[float, ...]
    rows: int


class Gating(NamedTuple):
    """Which adapters a denoiser call of R rows runs, and how strongly; ``Gating()`` is the base model."""

    gates: Tensor | None = None  # (R, m), a gate vector per row; None: the base model, or ``merged``
    factors: bool = False  # gate A and B apart: (Σ g B)(Σ g A), the paper code's Rewarded Soup
    merged: tuple[float, ...] | None = None  # instead of gates: one gate vector for all rows, run on merged weights
    segments: tuple[Segment, ...] = ()  # instead of gates: all R rows in order, on merged weights of several vectors

    @classmethod
    def of(cls, gates: Gating | Tensor | None) -> Gating:
        """The gating that is given: itself, gates (R, m) alone, or None for the base model."""
        return gates if isinstance(gates, Gating) else cls(gates)

    def vectors(self, rows: int) -> Tensor | None:
        """The gate vector of each of R rows, (R, m), also where they are to run on merged weights."""
        if self.segments:
            return torch.cat([torch.tensor([vector]).expand(count, -1) for vector, count in self.segments])
        return self.gates if self.merged is None else torch.tensor([self.merged]).expand(rows, -1)

    def repeated(self, times: int) -> Gating:
        """The gating of ``times`` copies of the rows: one after the other, or side by side where they are segments."""
        gates = None if self.gates is None else torch.cat([self.gates] * times)
        return self._replace(
            gates=gates, segments=tuple(Segment(vector, rows * times) for vector, rows in self.segments)
        )

    def scaled(self, scale: float) -> Gating:
        """Every ΔW times ``scale``."""
        if scale == 1:
            return self
        # factors are averaged apart: the root on each side scales their product
        factor = scale**0.5 if self.factors else scale
        gates = None if self.gates is None else self.gates * factor

        def times(vector: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(value * factor for value in vector)

        return self._replace(
            gates=gates,
            merged=None if self.merged is None else times(self.merged),
            segments=tuple(Segment(times(vector), rows) for vector, rows in self.segments),
        )
