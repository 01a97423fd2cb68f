"""Which adapters a denoiser call runs, as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gating(NamedTuple):
    """Which adapters a denoiser call of R rows runs, and how strongly; ``Gating()`` is the base model."""

    gates: Tensor | None = None  # (R, m), a gate vector per row; None: the base model, or ``merged``
    factors: bool = False  # gate A and B apart: (Σ g B)(Σ g A), the paper code's Rewarded Soup
    merged: tuple[float, ...] | None = None  # instead of gates: one gate vector for all rows, run on merged weights

    @classmethod
    def of(cls, gates: Gating | Tensor | None) -> Gating:
        """The gating that is given: itself, gates (R, m) alone, or None for the base model."""
        return gates if isinstance(gates, Gating) else cls(gates)

    def vectors(self, rows: int) -> Tensor | None:
        """The gate vector of each of R rows, (R, m), also where they are to run on merged weights."""
        return self.gates if self.merged is None else torch.tensor([self.merged]).expand(rows, -1)

    def repeated(self, times: int) -> Gating:
        """The gating of ``times`` copies of the rows, one after the other."""
        return self if self.gates is None else self._replace(gates=torch.cat([self.gates] * times))

    def scaled(self, scale: float) -> Gating:
        """Every ΔW times ``scale``."""
        if scale == 1:
            return self
        # factors are averaged apart: the root on each side scales their product
        factor = scale**0.5 if self.factors else scale
        gates = None if self.gates is None else self.gates * factor
        merged = None if self.merged is None else tuple(value * factor for value in self.merged)
        return self._replace(gates=gates, merged=merged)
