"""The adapted layers in the next denoiser calls: gated row by row, or on merged weights."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dblightning.adapters.gated import GatedLayer
from dblightning.adapters.gating import Gating, Segment
from dblightning.adapters.layers import AdaptedLayers


class AdapterForwards(AdaptedLayers):
    """Gates per row (:meth:`gated`), or merged weights: of one gate vector (:meth:`merged`), or of several.

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
        self._seen: dict[str, _Seen] = {}  # the adapters' values, see :meth:`_version`
        self._versions = itertools.count()
        super().__init__(denoiser)

    def refresh(self) -> None:
        super().refresh()
        self._merged_keys.clear()
        self._seen.clear()

    def _lay_out(self) -> None:
        super()._lay_out()
        self._on_device.clear()
        self._stacked, self._stacks = False, ([], [])

    def use(self, gating: Gating) -> AbstractContextManager[None]:
        """Forwards inside use these gates, or merged weights."""
        if gating.segments:
            return self.segmented(gating.segments, gating.factors)
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
        with self.restored((gates, factors, (), *scales)):
            yield

    @contextmanager
    def merged(self, gate: Sequence[float], factors: bool = False) -> Iterator[None]:
        """Forwards inside use W + ΔW of one gate vector for all rows, at the plain model's cost.

        The merged copies of the adapted matrices are kept, at most ``merged_limit`` of them.
        """
        with self._on_merged({tuple(float(value) for value in gate): None}.items(), factors):
            yield

    def segmented(self, segments: Sequence[Segment], factors: bool = False) -> AbstractContextManager[None]:
        """Forwards inside use each segment's merged weights for its rows, the batch's in order, in one call.

        Every layer that is not adapted runs all rows at once; an adapted one multiplies a segment at a time.

        Raises:
            ValueError: more gate vectors than ``merged_limit``.
        """
        return self._on_merged(segments, factors)

    @contextmanager
    def _on_merged(self, parts: Iterable[tuple[tuple[float, ...], int | None]], factors: bool) -> Iterator[None]:
        """Forwards inside use merged weights of these gate vectors, each for so many rows; None: for all."""
        vectors = [vector for vector in dict.fromkeys(vector for vector, _ in parts) if any(vector)]
        self._check_use(bool(vectors))
        if len(vectors) > max(self.merged_limit, 1):
            raise ValueError(f"merged_limit is {self.merged_limit}, too few copies for {len(vectors)} gate vectors")
        bases = self._bases_state() if vectors else ()
        keys = {vector: self._merge(vector, factors, bases) for vector in vectors}
        merged = tuple((keys.get(vector), rows) for vector, rows in parts) if vectors else ()
        with self.restored((None, False, merged, [], [])):
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
        """The gates in force: (gates, factors, merged keys with their rows, scales, strengths)."""
        state = self.state
        return state.gates, state.factors, state.merged, state.scales, state.strengths

    def drop_merged(self) -> None:
        """Free every merged copy."""
        self._merged_keys.clear()
        self._seen.clear()
        for layer in self.layers():
            layer.merged_weights.clear()

    def _enforce(self, snapshot: tuple[Any, ...]) -> None:
        state, merged = self.state, snapshot[2]
        if merged != state.merged:
            for layer in self._layers:  # past nn.Module's own __setattr__, which takes a microsecond per layer
                layer.__dict__["merged_weight"] = _in_force(layer, merged)
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
    def _merge(self, gate: tuple[float, ...], factors: bool, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        layers = self._layers
        used = [name for name, value in zip(self.state.names, gate, strict=True) if value]
        values = tuple((name, self._version(name)) for name in used)
        key = (gate, factors, tuple(self.state.names), values, *bases)
        if key in self._merged_keys:
            self._merged_keys.move_to_end(key)
            return key
        stale = [old for old in self._merged_keys if _outdated(old, key)]
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

    def _bases_state(self) -> tuple[Any, ...]:
        """State of the base weights, which merged copies contain."""
        bases = [layer.base_layer.weight for layer in self._layers]
        versions = sum(0 if weight.is_inference() else weight._version for weight in bases)
        return versions, bases[0].device, bases[0].dtype

    @torch.no_grad()
    def _version(self, name: str) -> int:
        """A number that changes whenever one of an adapter's values does, whatever it was changed by.

        A tensor's version counter does not see ``p.data.mul_`` or a write through another view of the storage, so the
        values are compared, bit by bit, with those of the last call. It happens at every denoiser call, in memory that
        is kept: temporaries of this size are new from the system each time, and their page faults cost several times
        the comparison.
        """
        sides = self._sides[name]
        count, device = sum([side.numel() for side in sides]), sides[0].device
        seen = self._seen.get(name)
        if seen is None or seen.values.numel() != count or seen.values.device != device:
            with torch.inference_mode(False):
                values = torch.empty(count, device=device)
                seen = _Seen(values, torch.empty_like(values), -1)
        torch.cat([side.view(-1) for side in sides], out=seen.spare)
        if seen.version < 0 or not torch.equal(seen.spare.view(torch.int32), seen.values.view(torch.int32)):
            seen = _Seen(seen.spare, seen.values, next(self._versions))
        self._seen[name] = seen
        return seen.version


class _Seen(NamedTuple):
    """An adapter's n values at the last look."""

    values: Tensor  # (n,)
    spare: Tensor  # (n,)
    version: int


def _in_force(layer: GatedLayer, merged: tuple[Any, ...]) -> Any:
    """A layer's ``merged_weight`` under these keys with their rows."""
    if not merged:
        return None
    if merged[0][1] is None:
        return layer.merged_weights.get(merged[0][0])
    pairs = [(layer.merged_weights.get(key), rows) for key, rows in merged]
    return pairs if any(pair is not None for pair, _ in pairs) else None


def _outdated(old: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    """Whether the merged copy ``old`` was made of other weights than those that ``key`` was just made of."""
    versions = dict(key[3])
    return old[4:] != key[4:] or any(versions.get(name, version) != version for name, version in old[3])
