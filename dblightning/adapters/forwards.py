"""The adapted layers in the next denoiser calls: gated row by row, or on merged weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dblightning.adapters.gating import Gating
from dblightning.adapters.layers import AdaptedLayers

#: elements that :meth:`AdapterForwards._checksum` reads at once
CHUNK = 2**22


class AdapterForwards(AdaptedLayers):
    """Gates per row (:meth:`gated`), or one gate vector for all rows (:meth:`merged`).

    Args:
        denoiser: see :class:`AdaptedLayers`.
        merged_limit: how many merged copies of the adapted matrices may be kept (one per gate vector in use).
    """

    def __init__(self, denoiser: nn.Module, merged_limit: int = 4) -> None:
        self.merged_limit = merged_limit
        self._merged_keys: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._on_device: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = {}  # as (columns, scales, columns)
        self._stacks: tuple[list[Tensor], list[Tensor]] = ([], [])  # (parts of the layers' stacks, what fills them)
        self._stacked = False
        self._position: Tensor | None = None
        super().__init__(denoiser)

    def refresh(self) -> None:
        super().refresh()
        self._merged_keys.clear()

    def _lay_out(self) -> None:
        super()._lay_out()
        self._on_device.clear()
        self._stacked, self._stacks = False, ([], [])

    def use(self, gating: Gating) -> AbstractContextManager[None]:
        """Forwards inside use these gates, or merged weights."""
        if gating.merged is None:
            return self.gated(gating.gates, gating.factors)
        return self.merged(gating.merged, gating.factors)

    @contextmanager
    def gated(self, gates: Tensor | None, factors: bool = False) -> Iterator[None]:
        """Forwards inside use these gates, one row of (rows, m) per batch row; None is the base model."""
        self._check_use(gates is not None)
        scales: tuple[list[Tensor], list[Tensor]] = ([], [])
        if gates is not None:
            if gates.shape[1] != len(self.state.names):
                raise ValueError(
                    f"gates are given for {gates.shape[1]} adapters, but the adapters are {self.state.names}"
                )
            scales = self._scales(gates, factors)
            self._stack()
        with self.restored((gates, factors, None, *scales)):
            yield

    @contextmanager
    def merged(self, gate: Sequence[float], factors: bool = False) -> Iterator[None]:
        """Forwards inside use W + ΔW of one gate vector for all rows, at the plain model's cost.

        The merged copies of the adapted matrices are kept, at most ``merged_limit`` of them.
        """
        self._check_use(any(gate))
        key = self._merge(tuple(float(value) for value in gate), factors) if any(gate) else None
        with self.restored((None, False, key, [], [])):
            yield

    @contextmanager
    def restored(self, snapshot: tuple[Any, ...]) -> Iterator[None]:
        """Forwards inside use the state that :meth:`snapshot` returned: for recomputation in gradient checkpointing."""
        before = self.snapshot()
        self._enforce(snapshot)
        try:
            yield
        finally:
            self._enforce(before)

    def snapshot(self) -> tuple[Any, ...]:
        """The gates in force: (gates, factors, merged key, scales, strengths)."""
        state = self.state
        return state.gates, state.factors, state.merged, state.scales, state.strengths

    def drop_merged(self) -> None:
        """Free every merged copy."""
        self._merged_keys.clear()
        for layer in self.layers():
            layer.merged_weights.clear()

    def _enforce(self, snapshot: tuple[Any, ...]) -> None:
        state, merged = self.state, snapshot[2]
        if merged != state.merged:
            for layer in self._layers:  # past nn.Module's own __setattr__, which takes a microsecond per layer
                layer.__dict__["merged_weight"] = None if merged is None else layer.merged_weights.get(merged)
        state.gates, state.factors, state.merged, state.scales, state.strengths = snapshot

    def _scales(self, gates: Tensor, factors: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Per layout, what each row scales the rank-space activations by (rows, R), and its gates (rows, n)."""
        if gates.device not in self._on_device:
            self._on_device[gates.device] = [
                (
                    torch.tensor([column for column, _ in layout], dtype=torch.long, device=gates.device),
                    torch.tensor([scale for _, scale in layout], device=gates.device),
                    torch.tensor(columns, dtype=torch.long, device=gates.device),
                )
                for layout, columns in zip(self._layouts, self._columns, strict=True)
            ]
        if factors:
            for layer in self._layers:
                layer.check_factors()
        places = self._on_device[gates.device]
        scales = [gates[:, columns] * (scales.sqrt() if factors else scales) for columns, scales, _ in places]
        return scales, [gates[:, columns] for _, _, columns in places]

    def _stack(self) -> None:
        """Fill the layers' stacked factors, where no gradient has to pass through the stacking.

        They are filled anew at every call, by one fused copy: whether a weight has changed since the last one cannot be
        seen for certain (``p.data.mul_`` leaves no trace), and a look at every value costs as much as copying it.
        """
        wanted = not torch.is_grad_enabled()
        if wanted != self._stacked:
            self._stacked = wanted
            self._allot(wanted)
        if self._stacks[0]:
            torch._foreach_copy_(*self._stacks)

    def _allot(self, wanted: bool) -> None:
        parts: list[Tensor] = []
        sources: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._layers:
                several = wanted and layer._plain and len(layer._names) > 1
                layer.__dict__["stack"] = layer.stacked() if several else None
                if several:
                    down, up = layer.stack[:2]  # type: ignore[index]
                    parts += [*down.split(layer._ranks), *up.split(layer._ranks, dim=1)]
                    sources += [side[name].weight for side in (layer.lora_A, layer.lora_B) for name in layer._names]
        self._stacks = parts, sources

    @torch.no_grad()
    def _merge(self, gate: tuple[float, ...], factors: bool) -> tuple[Any, ...]:
        layers = self._layers
        key = (gate, factors, *self._weights_state())
        if key in self._merged_keys:
            self._merged_keys.move_to_end(key)
            return key
        stale = [old for old in self._merged_keys if old[3:] != key[3:]]
        while len(self._merged_keys) - len(stale) >= self.merged_limit:
            stale.append(next(old for old in self._merged_keys if old not in stale))
        for old in stale:
            del self._merged_keys[old]
        for layer in layers:
            for old in stale:
                layer.merged_weights.pop(old, None)
            pair = layer.merged_pair(gate, factors)
            if pair is not None:
                layer.merged_weights[key] = pair
        self._merged_keys[key] = None
        return key

    def _weights_state(self) -> tuple[Any, ...]:
        """State that merged copies depend on: adapters' names, their values, and the base weights they are added to."""
        bases = [layer.base_layer.weight for layer in self._layers]
        versions = sum(0 if weight.is_inference() else weight._version for weight in bases)
        return tuple(self.state.names), self._checksum(), versions, bases[0].device, bases[0].dtype

    @torch.no_grad()
    def _checksum(self) -> tuple[int, ...]:
        """A sum over the adapters' bits that any changed value changes, whatever it was changed by.

        A tensor's version counter does not see ``p.data.mul_`` or a write through another view of the storage.
        Each value, as an integer, is multiplied by an odd number of its own, modulo 2³².
        """
        flat = torch.cat([side.flatten() for side in self._sides]).float().view(torch.int32)
        if (
            self._position is None
            or self._position.device != flat.device
            or len(self._position) < min(len(flat), CHUNK)
        ):
            self._position = torch.arange(min(len(flat), CHUNK), dtype=torch.int32, device=flat.device) * 2 + 1
        position = self._position
        sums = [(part * position[: len(part)]).sum() for part in flat.split(CHUNK)]
        return tuple(torch.stack(sums).tolist())
