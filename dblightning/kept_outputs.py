"""Outputs that a run keeps from one step to the next, for blends that do not compute all their rows at every step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dblightning.blend_step import BlendStep, PartialStep


class Recalled(NamedTuple):
    """What one step takes from earlier ones, and what it leaves to later ones."""

    kept: KeptOutputs
    slots: Tensor  # int64 (K',): the places among K of the rows that this step computes
    rest: Tensor  # (K, B) float64: coefficients of the kept outputs
    fresh: Tensor  # bool (B,): images all of whose rows are computed

    def complete(self, mixed: Tensor, rows: Tensor) -> Tensor:
        """The step's mix: what was computed, (B, …), and the kept outputs. Keeps ``rows``, (K', B, …)."""
        outputs = self.kept.outputs
        spread = [1] * (rows.ndim - 2)
        if outputs is not None and bool((self.rest != 0).any()):
            rest = self.rest.to(mixed.device, mixed.dtype)
            mixed = mixed + (rest.view(*rest.shape, *spread) * outputs).sum(0)
        if bool(self.fresh.any()):
            height, batch = self.rest.shape
            wide = torch.zeros(height, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
            wide = wide.index_copy(0, self.slots.to(rows.device), rows)
            known = torch.zeros(height, batch, dtype=torch.bool).index_fill(0, self.slots, True)
            if outputs is not None and not bool(self.fresh.all()):
                wide = torch.where(self.fresh.to(rows.device).view(1, -1, *spread), wide, outputs)
                known = torch.where(self.fresh, known, self.kept.known)
            self.kept.outputs, self.kept.known = wide, known
        return mixed


class KeptOutputs:
    """The outputs of each image's rows at the last step that computed all that its mix needs. Starts without any."""

    def __init__(self) -> None:
        self.outputs: Tensor | None = None  # (K, B, …), as the denoiser made them
        self.known = torch.zeros(0, 0, dtype=torch.bool)  # (K, B), on the CPU

    def drop(self) -> None:
        """Forget all, so that the next step computes every row; where what they were made of has changed."""
        self.outputs = None

    def split(self, step: BlendStep) -> tuple[BlendStep, Recalled]:
        """The rows of a step to compute now, as a step of their own, and the rest.

        An image that lacks a kept output which the step wants has all its rows computed.
        """
        gates, mix, factors = step
        now = step.now if isinstance(step, PartialStep) else mix
        wanted = mix != now
        missing = wanted.any(0) if self.outputs is None else (wanted & ~self.known).any(0)
        now = torch.where(missing, mix, now)
        slots = (now != 0).any(1).nonzero().flatten()
        return BlendStep(gates, now, factors), Recalled(self, slots, mix - now, (mix == now).all(0))
