"""The *gated* LoRA layer: every row of a batch uses its own mixture of adapters.

    y = W x + Σ_i g_i · s_i · B_i A_i x        g: the row's gate, a vector over adapters; s_i: LoRA scale

Gates are set once per denoiser call and shared by all layers, so rows with different adapters share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor


@dataclass
class GateState:
    """What the next forward of every gated layer does; one object shared by all layers of a denoiser.

    Everything that does not differ between layers is worked out once per denoiser call, by :class:`AdapterBank`: the
    layers only read tensors, so that ``torch.compile`` traces them in one piece.
    """

    names: list[str] = field(default_factory=list)  # adapters in gate order
    gates: Tensor | None = None  # (rows, m); None: the base model
    factors: bool = False  # gate A and B apart: (Σ g B)(Σ g A), the paper code's Rewarded Soup
    merged: tuple[Any, ...] | None = None  # key of the merged weights to use instead of W
    scales: list[Tensor] = field(default_factory=list)  # per layout of adapters, what scales each rank (rows, R)


class GatedLinear(LoraLinear):
    """PEFT's LoRA linear layer with a gate per batch row; without a :class:`GateState` it is PEFT's own forward."""

    gate_state: GateState | None
    layout: int  # index into the state's scales
    stack: tuple[Tensor, Tensor] | None
    merged_weights: dict[tuple[Any, ...], Tensor]
    merged_weight: Tensor | None  # of merged_weights, the one in force
    _names: list[str]
    _ranks: list[int]

    def install(self, state: GateState) -> None:
        """Join the layer to the denoiser's shared state, and index its adapters in the state's order."""
        self.gate_state = state
        self.merged_weights = {}
        self.merged_weight = None
        self.index()

    def index(self) -> None:
        """Index the adapters the state names, in its order."""
        state = self.gate_state
        assert state is not None
        self.stack = None
        self._names = [name for name in state.names if name in self.lora_A]
        self._ranks = [self.r[name] for name in self._names]

    def arrangement(self) -> tuple[tuple[int, float], ...]:
        """For each rank of each adapter here, its column of the gates and its LoRA scale."""
        assert self.gate_state is not None
        names = self.gate_state.names
        return tuple(
            (names.index(name), float(self.scaling[name])) for name in self._names for _ in range(self.r[name])
        )

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All A stacked (R, in) and all B side by side (out, R), R the sum of ranks."""
        downs = [self.lora_A[name].weight for name in self._names]
        ups = [self.lora_B[name].weight for name in self._names]
        return (downs[0], ups[0]) if len(downs) == 1 else (torch.cat(downs), torch.cat(ups, dim=1))

    def _sum_factors(self, hidden: Tensor, root: Tensor) -> Tensor:
        """Rank-space activations (rows, …, R) as averaged factors make them: each adapter's B sees the sum over A."""
        hidden, root = hidden.unflatten(-1, (len(self._names), -1)), root.unflatten(-1, (len(self._names), -1))
        return ((hidden * root).sum(-2, keepdim=True) * root).flatten(-2)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: GateState | None = getattr(self, "gate_state", None)
        if state is None:
            return super().forward(x, *args, **kwargs)
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.base_layer.bias)
        y = self.base_layer(x, *args, **kwargs)
        gates = state.gates
        if gates is None or not self._names:
            return y
        if x.shape[0] != gates.shape[0]:
            raise ValueError(f"gates are set for {gates.shape[0]} rows, but the layer was called with {x.shape[0]}")
        down, up = self.stacked() if self.stack is None else self.stack
        hidden = F.linear(x, down.to(x.dtype))
        scale = state.scales[self.layout].to(hidden.dtype).view(len(x), *[1] * (x.ndim - 2), -1)
        hidden = self._sum_factors(hidden, scale) if state.factors else hidden * scale
        return y + F.linear(hidden, up.to(x.dtype)).to(y.dtype)

    def check_one_rank(self) -> None:
        """Raises ValueError if this layer's adapters are of several ranks."""
        if len(set(self._ranks)) > 1:
            raise ValueError(
                f"averaging LoRA factors needs adapters of one rank, got ranks {self._ranks} of {self._names}; "
                "use the exact soup (rewarded-soup)"
            )

    def delta_weight(self, gate: Sequence[float], factors: bool) -> Tensor | None:
        """ΔW of one gate vector in float32, (out, in); None when no adapter of this layer is gated on."""
        assert self.gate_state is not None
        used = [(name, gate[self.gate_state.names.index(name)]) for name in self._names]
        used = [(name, value) for name, value in used if value != 0]
        if not used:
            return None
        if factors:
            self.check_one_rank()
            down = sum(value * self.scaling[name] ** 0.5 * self.lora_A[name].weight.float() for name, value in used)
            up = sum(value * self.scaling[name] ** 0.5 * self.lora_B[name].weight.float() for name, value in used)
            return up @ down
        products = (
            value * self.scaling[name] * (self.lora_B[name].weight.float() @ self.lora_A[name].weight.float())
            for name, value in used
        )
        return torch.stack(list(products)).sum(0)
