"""The *gated* LoRA layer: every row of a batch uses its own mixture of adapters.

    y = W x + Σ_i g_i · s_i · (B_i A_i x + b_i)        g: the row's gate, a vector over adapters; s_i: LoRA scale

Gates are set once per denoiser call and shared by all layers, so rows with different adapters share a batch.

A DoRA adapter replaces W by W_i = c_i (W + s_i B_i A_i), where c_i = magnitude / ‖W + s_i B_i A_i‖ per output row
(https://arxiv.org/abs/2402.09353, eq. 5). Its ΔW_i is W_i − W, so a gate of 1 is PEFT's own DoRA forward, a gate of 0
the base model, and gates in between interpolate weights linearly, as a soup of full models does:

    y = W x + Σ_i g_i ((c_i − 1) W x + c_i s_i B_i A_i x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from torch import Tensor, nn

# Python lets a PEFT layer become a gated one only if PEFT's class is the first base and the only one with a LoraLayer
_LoraLayer: Any = LoraLayer if TYPE_CHECKING else object
#: W + ΔW of a layer under one gate vector, and its bias
Merged: TypeAlias = tuple[Tensor, Tensor | None]


@dataclass
class GateState:
    """Instructions for the next forward of every gated layer; one object shared by all layers of a denoiser.

    Everything that does not differ between layers is computed once per denoiser call, by :class:`AdapterBank`: the
    layers only read tensors, so that ``torch.compile`` traces them in one piece.
    """

    names: list[str] = field(default_factory=list)  # adapters in gate order
    gates: Tensor | None = None  # (rows, m); None: the base model
    factors: bool = False  # gate A and B apart: (Σ g B)(Σ g A), the paper code's Rewarded Soup
    merged: tuple[Any, ...] = ()  # (key of the merged weights to use instead of W, their rows; None: all), …
    scales: list[Tensor] = field(default_factory=list)  # per layout of adapters, what scales each rank (rows, R)
    strengths: list[Tensor] = field(default_factory=list)  # per layout of adapters, their gates (rows, n)


class Stack(NamedTuple):
    """A layer's adapters side by side: n adapters of R ranks in all."""

    down: Tensor  # every A: (R, in), of a convolution (R, in, kh, kw)
    up: Tensor  # every B, DoRA's times c: (out, R), of a convolution (out, R, 1, 1)
    offset: Tensor | None = None  # s b of the adapters that have a bias: (n, out)
    rescale: Tensor | None = None  # c − 1 of the DoRA adapters: (n, out)


class GatedLayer(_LoraLayer):
    """Base class for gated layers; each differs in how it multiplies and where its channels are."""

    gate_state: GateState | None
    layout: int  # index into the state's scales
    stack: Stack | None
    merged_weights: dict[tuple[Any, ...], Merged]
    merged_weight: Merged | list[tuple[Merged | None, int]] | None  # in force; of several vectors, each with its rows
    own_scaling: dict[str, float]  # each adapter's scale without what `set_adapters` multiplies it with
    _names: list[str]
    _ranks: list[int]
    _plain: bool  # no adapter here has a bias or is a DoRA

    def install(self, state: GateState) -> None:
        """Join the layer to the denoiser's shared state, and index its adapters in the state's order."""
        self.gate_state = state
        self.merged_weights = {}
        self.merged_weight = None
        self.own_scaling = {name: self.alpha_scale(name) for name in self.scaling}
        self.index()

    def alpha_scale(self, name: str) -> float:
        """The scale that rank and alpha give an adapter: alpha / r, or alpha / √r for a rank-stabilised one."""
        rank = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(rank) if self.use_rslora.get(name) else rank)

    def index(self) -> None:
        """Index the adapters the state names, in its order."""
        state = self.gate_state
        assert state is not None
        self.stack = None
        self._names = [name for name in state.names if name in self.lora_A]
        self._ranks = [self.r[name] for name in self._names]
        self._plain = not any(self.has_bias(name) or self.is_dora(name) for name in self._names)

    def has_bias(self, name: str) -> bool:
        """Whether the adapter adds a bias (``lora_bias``)."""
        return self.lora_B[name].bias is not None

    def is_dora(self, name: str) -> bool:
        """Whether the adapter is a DoRA."""
        return name in self.lora_magnitude_vector

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's A, B, and where it has them its bias and magnitude."""
        if name not in self.lora_A:
            return []
        found = [self.lora_A[name].weight, self.lora_B[name].weight]
        found += [self.lora_B[name].bias] if self.has_bias(name) else []
        return found + ([self.lora_magnitude_vector[name].weight] if self.is_dora(name) else [])

    def arrangement(self) -> tuple[tuple[int, float], ...]:
        """For each rank of each adapter here, its column of the gates and its LoRA scale."""
        return tuple((column, self.scaling[name]) for column, name in self._columns() for _ in range(self.r[name]))

    def columns(self) -> tuple[int, ...]:
        """For each adapter here, its column of the gates."""
        return tuple(column for column, _ in self._columns())

    def _columns(self) -> list[tuple[int, str]]:
        assert self.gate_state is not None
        return [(self.gate_state.names.index(name), name) for name in self._names]

    def stacked(self) -> Stack:
        """The adapters side by side, R the sum of their ranks."""
        downs = [self.lora_A[name].weight for name in self._names]
        ups = [self.lora_B[name].weight for name in self._names]
        if self._plain:
            return Stack(*((downs[0], ups[0]) if len(downs) == 1 else (torch.cat(downs), torch.cat(ups, dim=1))))
        out = len(ups[0])
        offsets = [self._offset(name, out) for name in self._names]
        rescales = [torch.zeros(out, device=ups[0].device)] * len(ups)
        for position, name in enumerate(self._names):
            if self.is_dora(name):
                factor = self.dora_factor(name)
                rescales[position] = factor - 1
                ups[position] = ups[position] * factor.view(-1, *[1] * (ups[position].ndim - 1))
        return Stack(torch.cat(downs), torch.cat(ups, dim=1), torch.stack(offsets), torch.stack(rescales))

    def _offset(self, name: str, out: int) -> Tensor:
        """s b of an adapter, zero where it has no bias; (out,)."""
        weight = self.lora_B[name].weight
        bias = self.lora_B[name].bias
        return torch.zeros(out, device=weight.device) if bias is None else self.scaling[name] * bias.float()

    def dora_factor(self, name: str) -> Tensor:
        """c = magnitude / ‖W + s B A‖ of a DoRA in float32, (out,); the norm passes no gradient (section 4.3)."""
        with torch.no_grad():
            whole = self._base_weight() + self._product(name).detach()
            norm = whole.flatten(1).norm(dim=1)
        return self.lora_magnitude_vector[name].weight.float().flatten() / norm

    def _base_weight(self) -> Tensor:
        return self.get_base_layer().weight.float()

    def _product(self, name: str) -> Tensor:
        """s B A in float32, in the base weight's shape."""
        up, down = self.lora_B[name].weight.float(), self.lora_A[name].weight.float()
        shape = self.get_base_layer().weight.shape
        return self.scaling[name] * (up.flatten(1) @ down.flatten(1)).view(shape)

    def _sum_factors(self, hidden: Tensor, root: Tensor) -> Tensor:
        """Rank-space activations as averaged factors make them: each adapter's B sees the sum over A."""
        dim, count = self._channels(hidden), len(self._names)
        hidden, root = hidden.unflatten(dim, (count, -1)), root.unflatten(dim, (count, -1))
        each = dim - 1 if dim < 0 else dim
        return ((hidden * root).sum(each, keepdim=True) * root).flatten(each, each + 1)

    def gated_forward(self, state: GateState, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output as the state says."""
        merged = self.merged_weight
        if isinstance(merged, list):
            parts = zip(x.split([rows for _, rows in merged]), merged, strict=True)
            return torch.cat(
                [self.base_layer(part) if pair is None else self._multiply(part, *pair) for part, (pair, _) in parts]
            )
        if merged is not None:
            return self._multiply(x, *merged)
        y = self.base_layer(x, *args, **kwargs)
        gates = state.gates
        if gates is None or not self._names:
            return y
        if x.shape[0] != gates.shape[0]:
            raise ValueError(f"gates are set for {gates.shape[0]} rows, but the layer was called with {x.shape[0]}")
        stack = self.stacked() if self.stack is None else self.stack
        hidden = self._multiply(x, stack.down.to(x.dtype))
        scale = self._per_row(state.scales[self.layout].to(hidden.dtype), hidden)
        hidden = self._sum_factors(hidden, scale) if state.factors else hidden * scale
        delta = self._project(hidden, stack.up.to(x.dtype)).to(y.dtype)
        if stack.offset is None or stack.rescale is None:
            return y + delta
        strengths = state.strengths[self.layout].float()
        bias = self.get_base_layer().bias
        plain = y if bias is None else y - self._per_row(bias.to(y.dtype)[None], y)
        rescale, offset = (self._per_row((strengths @ each).to(y.dtype), y) for each in (stack.rescale, stack.offset))
        return y + plain * rescale + delta + offset

    def check_factors(self) -> None:
        """Raises ValueError if averaging the factors of this layer's adapters is not defined."""
        doras = [name for name in self._names if self.is_dora(name)]
        if doras:
            raise ValueError(
                f"averaging LoRA factors is not defined for DoRA adapters such as {doras[0]!r}; "
                "use the exact soup (rewarded-soup)"
            )
        if len(set(self._ranks)) > 1:
            raise ValueError(
                f"averaging LoRA factors needs adapters of one rank, got ranks {self._ranks} of {self._names}; "
                "use the exact soup (rewarded-soup)"
            )

    def delta_weight(self, gate: Sequence[float], factors: bool) -> Tensor | None:
        """ΔW of one gate vector in float32 and W's shape; None when no adapter of this layer is gated on."""
        used = self._used(gate)
        if not used:
            return None
        if factors:
            self.check_factors()
            roots = [(name, value * self.scaling[name] ** 0.5) for name, value in used]
            down = torch.stack([root * self.lora_A[name].weight.float() for name, root in roots]).sum(0)
            up = torch.stack([root * self.lora_B[name].weight.float() for name, root in roots]).sum(0)
            return (up.flatten(1) @ down.flatten(1)).view(self.get_base_layer().weight.shape)
        return torch.stack([value * self._full_delta(name) for name, value in used]).sum(0)

    def _full_delta(self, name: str) -> Tensor:
        """ΔW of one adapter at gate 1: s B A, or c (W + s B A) − W."""
        product = self._product(name)
        if not self.is_dora(name):
            return product
        base = self._base_weight()
        return self.dora_factor(name).view(-1, *[1] * (base.ndim - 1)) * (base + product) - base

    def delta_bias(self, gate: Sequence[float]) -> Tensor | None:
        """Change of the bias under one gate vector, float32 (out,); None when no gated adapter has a bias."""
        used = [(name, value) for name, value in self._used(gate) if self.has_bias(name)]
        if not used:
            return None
        return torch.stack([value * self._offset(name, len(self.lora_B[name].weight)) for name, value in used]).sum(0)

    def merged_pair(self, gate: Sequence[float], factors: bool) -> Merged | None:
        """W + ΔW and bias of one gate vector, in the dtype the layer computes in; None where they are W's own."""
        delta = self.delta_weight(gate, factors)
        if delta is None:
            return None
        base = self.get_base_layer()
        dtype = compute_dtype(base)
        bias, added = base.bias, self.delta_bias(gate)
        if added is not None:
            bias = added if bias is None else bias.float() + added
        return (base.weight.float() + delta).to(dtype), None if bias is None else bias.detach().to(dtype)

    def _used(self, gate: Sequence[float]) -> list[tuple[str, float]]:
        return [(name, gate[column]) for column, name in self._columns() if gate[column] != 0]

    def _channels(self, activations: Tensor) -> int:
        """The dimension of the channels."""
        raise NotImplementedError

    def _per_row(self, values: Tensor, like: Tensor) -> Tensor:
        """Values (rows, channels) in a shape that broadcasts against activations."""
        raise NotImplementedError

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The base layer's operation with another weight."""
        raise NotImplementedError

    def _project(self, hidden: Tensor, up: Tensor) -> Tensor:
        """B times rank-space activations."""
        raise NotImplementedError


class GatedLinear(LoraLinear, GatedLayer):
    """PEFT's LoRA linear layer with a gate per batch row; without a :class:`GateState` it is PEFT's own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: GateState | None = getattr(self, "gate_state", None)
        return super().forward(x, *args, **kwargs) if state is None else self.gated_forward(state, x, *args, **kwargs)

    def _channels(self, activations: Tensor) -> int:
        return -1

    def _per_row(self, values: Tensor, like: Tensor) -> Tensor:
        return values.view(len(values), *[1] * (like.ndim - 2), -1)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def _project(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.linear(hidden, up)


class GatedConv2d(LoraConv2d, GatedLayer):
    """PEFT's LoRA convolution with a gate per batch row: A has the base's kernel, stride and padding, B is 1×1."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: GateState | None = getattr(self, "gate_state", None)
        return super().forward(x, *args, **kwargs) if state is None else self.gated_forward(state, x, *args, **kwargs)

    def _channels(self, activations: Tensor) -> int:
        return 1

    def _per_row(self, values: Tensor, like: Tensor) -> Tensor:
        return values.view(len(values), -1, *[1] * (like.ndim - 2))

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        base = self.get_base_layer()
        return F.conv2d(x, weight, bias, base.stride, base.padding)

    def _project(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(hidden, up)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype a layer multiplies in: its weight's, or what diffusers' layerwise casting turns the storage into."""
    hooks = getattr(layer, "_diffusers_hook", None)
    casting = None if hooks is None else hooks.get_hook("layerwise_casting")
    return layer.weight.dtype if casting is None else casting.compute_dtype  # type: ignore[return-value]


def _apply_keeping_float32(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply`` that moves parameters but leaves them float32: for ``.to(dtype)`` and layerwise casting.

    Adapters are trained and kept in float32 under a half-precision base: an optimiser's small steps would be lost.
    """

    def move(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return fn(tensor)
        like = fn(torch.empty(0, device=tensor.device))
        return tensor.to(like.device) if like.dtype != torch.float32 else fn(tensor)

    return nn.Module._apply(module, move, recurse)


class Float32Linear(nn.Linear):
    """One of a linear layer's LoRA factors."""

    _apply = _apply_keeping_float32


class Float32Conv2d(nn.Conv2d):
    """One of a convolution's LoRA factors."""

    _apply = _apply_keeping_float32


class Float32DoraLinear(DoraLinearLayer):
    """A linear layer's DoRA magnitude."""

    _apply = _apply_keeping_float32


class Float32DoraConv2d(DoraConv2dLayer):
    """A convolution's DoRA magnitude."""

    _apply = _apply_keeping_float32


#: PEFT's classes and ours that replace them in place
GATED: dict[type, type[GatedLayer]] = {LoraLinear: GatedLinear, LoraConv2d: GatedConv2d}
FLOAT32: dict[type, type[nn.Module]] = {
    nn.Linear: Float32Linear,
    nn.Conv2d: Float32Conv2d,
    DoraLinearLayer: Float32DoraLinear,
    DoraConv2dLayer: Float32DoraConv2d,
}


def keep_float32(layer: GatedLayer, name: str) -> None:
    """Make an adapter's parameters in a layer float32, and let nothing cast them any more."""
    for side in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        if name in side:
            side[name].float()
            side[name].__class__ = FLOAT32.get(type(side[name]), type(side[name]))


#: the hook of diffusers' layerwise casting that keeps PEFT from casting inputs
AUTOCAST_HOOK = "peft_autocast_disable"


def why_not(module: nn.Module) -> str | None:
    """Why a PEFT layer cannot be gated; None if it can."""
    kind = type(module)
    if not isinstance(module, LoraLayer):
        return f"a {kind.__name__} adapter is not a LoRA"
    base = module.get_base_layer()
    if kind not in GATED and not isinstance(module, GatedLayer):
        return f"only linear layers and 2-D convolutions can be adapted, got a LoRA on {type(base).__name__}"
    if isinstance(base, nn.Conv2d) and (
        base.groups > 1 or max(base.dilation) > 1 or base.padding_mode != "zeros" or isinstance(base.padding, str)
    ):
        return "a LoRA on a convolution with groups, dilation or padding other than zeros has no product B A"
    other = [variant for variant in module.lora_variant.values() if "Dora" not in type(variant).__name__]
    if other:
        return f"LoRA and DoRA can be gated, got PEFT's {type(other[0]).__name__}"
    if module.merged:
        return "a LoRA is fused into the base weights; call pipe.unfuse_lora() first"
    hooks = getattr(module, "_diffusers_hook", None)
    if kind in GATED and "forward" in module.__dict__ and set(getattr(hooks, "hooks", ())) != {AUTOCAST_HOOK}:
        return f"a hook has replaced the forward of a {kind.__name__} layer with a LoRA; wrap the pipeline before that"
    return None
