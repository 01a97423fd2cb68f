"""The adapters of one frozen denoiser. PEFT creates and stores them; the forward is :mod:`gated`'s.

PEFT's ``set_adapter`` walks all modules (milliseconds) and is never called while sampling.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dblightning.adapters.files import (
    METADATA_KEY,
    WEIGHTS_NAME,
    _jsonable,
    _with_peft_names,
    base_name,
    fingerprint,
    read_metadata,
)
from dblightning.adapters.gated import GatedLinear, GateState

#: the paper's targets: query, key, value and output projections of every attention
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class AdapterBank:
    """The adapters of one denoiser: add, load, export, and choose per row (``gated``) or for all rows (``merged``).

    Args:
        unet: the frozen denoiser, a diffusers model with PEFT support. Its parameters get ``requires_grad=False``;
            LoRAs it already has are taken over.
        merged_limit: how many merged copies of the adapted matrices may be kept (one per gate vector in use).
    """

    def __init__(self, unet: nn.Module, merged_limit: int = 4) -> None:
        self.unet = unet.requires_grad_(False)
        self.state = GateState()
        self.merged_limit = merged_limit
        self._merged_keys: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._fingerprint = fingerprint(unet)
        self._layers: list[GatedLinear] = []
        self._sides: list[Tensor] = []
        self._layouts: list[tuple[tuple[int, float], ...]] = []  # the layers' distinct arrangements of adapters
        self._on_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}  # them as (columns, scales)
        self._stacked_for: tuple[Any, ...] | None = None  # state of the weights the layers' stacks were made of
        present = list(getattr(unet, "peft_config", {}))
        if present:  # LoRAs the pipeline came with
            self.state.names = present
            self.refresh()
            for name in present:
                self._in_float32(name)

    @property
    def names(self) -> list[str]:
        """Adapters in gate order."""
        return list(self.state.names)

    def layers(self) -> Iterator[GatedLinear]:
        """Every adapted layer."""
        return iter(self._layers)  # kept by `refresh`: walking the modules takes milliseconds, too long for every step

    def add(
        self,
        name: str,
        rank: int = 4,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] = ATTENTION,
        seed: int | None = None,
    ) -> None:
        """Create a new adapter, initially without effect (B = 0), and make it trainable in float32.

        Args:
            name: the adapter's name; by custom the reward it is trained on.
            rank: LoRA rank (paper: 4).
            lora_alpha: LoRA alpha; the scale is alpha / rank. Defaults to ``rank``, scale 1.
            target_modules: name endings of the linear layers to adapt.
            seed: seed of A's initial values; None takes torch's global generator.

        Raises:
            ValueError: the name exists, no layer matches, or a matched layer is not linear.
        """
        self._check_new(name)
        config = LoraConfig(
            r=rank, lora_alpha=rank if lora_alpha is None else lora_alpha, target_modules=list(target_modules)
        )
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                with _several_adapters():
                    self.unet.add_adapter(config, adapter_name=name)  # type: ignore[operator]
            except ValueError as error:
                raise ValueError(f"no adapter {name!r}: {error}") from error
        self._adopt(name)
        self.train_only(name)

    def load(self, name: str, path: str | Path, pipeline: Any, allow_other_base: bool = False) -> dict[str, Any]:
        """Load an adapter in diffusers' LoRA format through diffusers' own loader.

        Args:
            name: its name here.
            path: folder with ``pytorch_lora_weights.safetensors``, or a safetensors file.
            pipeline: the diffusers pipeline that owns the denoiser.
            allow_other_base: load even if the adapter's metadata names another base model.

        Returns:
            The adapter's metadata (empty for a foreign file).

        Raises:
            FileNotFoundError: nothing there.
            ValueError: the name exists; the file fits another architecture; it was trained on another base; or a key
                of the file found no place in the model.
        """
        self._check_new(name)
        path = Path(path)
        file = path / WEIGHTS_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no LoRA for adapter {name!r}: {file} does not exist; give the exported folder")
        metadata = read_metadata(file)
        self._check_base(name, file, metadata, allow_other_base)
        state, alphas, config = pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, unet_config=self.unet.config, return_lora_metadata=True
        )
        state = _with_peft_names(state)
        self._check_fit(name, file, state)
        with _several_adapters():
            pipeline.load_lora_into_unet(state, alphas, self.unet, adapter_name=name, metadata=config)
        self._adopt(name)
        loaded = set(self.state_dict(name))
        expected = {key.removeprefix("unet.") for key in state if ".lora_" in key}
        if loaded != expected:
            stray = sorted(loaded ^ expected)
            raise ValueError(f"adapter {name!r} from {file} did not load whole; keys without a match: {stray[:5]}")
        self.train_only(None)
        return metadata

    def export(self, name: str, folder: str | Path, pipeline: Any, metadata: dict[str, Any] | None = None) -> Path:
        """Write an adapter so that plain diffusers' ``pipe.load_lora_weights(folder)`` loads it.

        The file appears whole or not at all (written aside, then renamed).

        Args:
            name: the adapter.
            folder: where ``pytorch_lora_weights.safetensors`` goes; created if needed.
            pipeline: the diffusers pipeline that owns the denoiser.
            metadata: JSON-able facts to keep in the file: reward, kl_weight, step, command, …

        Returns:
            The file's path.
        """
        from safetensors import safe_open
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: _jsonable(value) for key, value in self.unet.peft_config[name].to_dict().items()}  # type: ignore[union-attr, index]
        partial = f".{os.getpid()}.{WEIGHTS_NAME}"
        pipeline.save_lora_weights(
            str(folder),
            unet_lora_layers={key: value.contiguous() for key, value in self.state_dict(name).items()},
            unet_lora_adapter_metadata=config,
            weight_name=partial,
        )
        with safe_open(folder / partial, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            header = dict(file.metadata() or {})
        facts = {"adapter": name, "base": base_name(pipeline), "base_fingerprint": self._fingerprint}
        header[METADATA_KEY] = json.dumps({**facts, **(metadata or {})}, default=str)
        save_file(tensors, folder / partial, metadata=header)
        os.replace(folder / partial, folder / WEIGHTS_NAME)
        return folder / WEIGHTS_NAME

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors as PEFT names them, detached and on the CPU."""
        state = get_peft_model_state_dict(self.unet, adapter_name=name)
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy tensors of :meth:`state_dict` into an existing adapter of the same shape.

        Raises:
            ValueError: keys that are missing or left over.
        """
        own = {
            key.replace(f".{name}.", "."): parameter
            for key, parameter in self.unet.named_parameters()
            if f".{name}." in key and ".lora_" in key
        }
        if set(own) != set(state):
            stray = sorted(set(own) ^ set(state))
            raise ValueError(f"the saved adapter does not match {name!r}; keys without a match: {stray[:5]}")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's A and B matrices."""
        pairs = ((layer.lora_A, layer.lora_B) for layer in self.layers() if name in layer.lora_A)
        return [side[name].weight for pair in pairs for side in pair]

    def train_only(self, name: str | None) -> None:
        """Let gradients reach this adapter and no other (None: no adapter at all)."""
        for layer in self.layers():
            for side in (layer.lora_A, layer.lora_B):
                for key, linear in side.items():
                    linear.requires_grad_(key == name)

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
        """The gates in force: (gates, factors, merged key, scales)."""
        return self.state.gates, self.state.factors, self.state.merged, self.state.scales

    def _enforce(self, snapshot: tuple[Any, ...]) -> None:
        state, merged = self.state, snapshot[2]
        if merged != state.merged:
            for layer in self._layers:  # past nn.Module's own __setattr__, which takes a microsecond per layer
                layer.__dict__["merged_weight"] = None if merged is None else layer.merged_weights.get(merged)
        state.gates, state.factors, state.merged, state.scales = snapshot

    @contextmanager
    def gated(self, gates: Tensor | None, factors: bool = False) -> Iterator[None]:
        """Forwards inside use these gates, one row of (rows, m) per batch row; None is the base model."""
        scales = [] if gates is None else self._scales(gates, factors)
        if gates is not None:
            self._stack()
        with self.restored((gates, factors, None, scales)):
            yield

    def _scales(self, gates: Tensor, factors: bool) -> list[Tensor]:
        """Per layout, what each row scales the rank-space activations by: (rows, R)."""
        if gates.device not in self._on_device:
            pairs = [tuple(zip(*layout, strict=True)) or ((), ()) for layout in self._layouts]
            self._on_device[gates.device] = [
                (
                    torch.tensor(columns, dtype=torch.long, device=gates.device),
                    torch.tensor(scales, device=gates.device),
                )
                for columns, scales in pairs
            ]
        if factors:
            for layer in self._layers:
                layer.check_one_rank()
        return [
            gates[:, columns] * (scales.sqrt() if factors else scales)
            for columns, scales in self._on_device[gates.device]
        ]

    def _stack(self) -> None:
        """Keep the layers' stacked factors, where no gradient has to pass through the stacking."""
        key = None if torch.is_grad_enabled() or len(self.state.names) < 2 else self._weights_state()
        if key == self._stacked_for:
            return
        self._stacked_for = key
        for layer in self._layers:
            several = key is not None and len(layer._names) > 1
            layer.__dict__["stack"] = layer.stacked() if several else None

    @contextmanager
    def merged(self, gate: Sequence[float], factors: bool = False) -> Iterator[None]:
        """Forwards inside use W + ΔW of one gate vector for all rows, at the plain model's cost.

        The merged copies of the adapted matrices are kept, at most ``merged_limit`` of them.
        """
        key = self._merge(tuple(float(value) for value in gate), factors) if any(gate) else None
        with self.restored((None, False, key, [])):
            yield

    @torch.no_grad()
    def _merge(self, gate: tuple[float, ...], factors: bool) -> tuple[Any, ...]:
        # the version sum notices an optimiser's in-place update, so a stale merge is never used
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
            delta = layer.delta_weight(gate, factors)
            if delta is not None:
                base = layer.get_base_layer().weight
                layer.merged_weights[key] = (base.float() + delta).to(base.dtype)
        self._merged_keys[key] = None
        return key

    def _weights_state(self) -> tuple[Any, ...]:
        """What copies made of the adapters depend on: the adapters' names, and the weights as they are."""
        weight = self._layers[0].base_layer.weight
        return tuple(self.state.names), sum(side._version for side in self._sides), weight.device, weight.dtype

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these adapters are all there are, in this order; the others wait at no cost.

        A gate vector has one entry per adapter and a gated layer computes every adapter it knows, so what is not used
        should not be there.

        Raises:
            ValueError: a name that is not loaded.
        """
        missing = [name for name in names if name not in self.state.names]
        if missing:
            raise ValueError(f"no adapter {missing[0]!r} is loaded; the names are {self.state.names}")
        before = self.state.names
        if list(names) == before:
            yield
            return
        self._name(list(names))
        try:
            yield
        finally:
            self._name(before)

    def _name(self, names: list[str]) -> None:
        self.state.names = names
        for layer in self._layers:
            layer.index()
        self._lay_out()

    def _lay_out(self) -> None:
        """Find the layers' distinct arrangements of adapters: one or two, as a rule."""
        arrangements = [layer.arrangement() for layer in self._layers]
        self._layouts = list(dict.fromkeys(arrangements))
        self._on_device.clear()
        self._stacked_for = None
        for layer, arrangement in zip(self._layers, arrangements, strict=True):
            layer.layout = self._layouts.index(arrangement)

    def remove(self, name: str) -> None:
        """Take an adapter out of the denoiser.

        Raises:
            ValueError: no such adapter.
        """
        if name not in self.state.names:
            raise ValueError(f"no adapter {name!r} is loaded; the names are {self.state.names}")
        self.state.names = [each for each in self.state.names if each != name]
        self.unet.delete_adapters(name)  # type: ignore[operator]
        self.refresh()

    def drop_merged(self) -> None:
        """Free every merged copy."""
        self._merged_keys.clear()
        for layer in self.layers():
            layer.merged_weights.clear()

    def refresh(self) -> None:
        """Re-index all layers; called after adapters were added, or the model was moved to another device."""
        for module in self.unet.modules():
            if isinstance(module, LoraLayer) and not isinstance(module, GatedLinear):
                # same class but for `forward`: so adapters read by diffusers' own loader become gated as they are
                if type(module) is not LoraLinear:
                    raise ValueError(f"only linear layers can be adapted, got a LoRA on {type(module).__name__}")
                if module.merged:
                    raise ValueError("a LoRA is fused into the base weights; call pipe.unfuse_lora() first")
                module.__class__ = GatedLinear
        self._layers = [module for module in self.unet.modules() if isinstance(module, GatedLinear)]
        self._sides = [
            side[name].weight for layer in self._layers for side in (layer.lora_A, layer.lora_B) for name in side
        ]
        self._merged_keys.clear()
        for layer in self._layers:
            layer.install(self.state)
        self._lay_out()

    def _check_new(self, name: str) -> None:
        if name in self.state.names:
            raise ValueError(f"an adapter named {name!r} is loaded already; the names are {self.state.names}")
        if not name or "." in name:
            raise ValueError(f"an adapter's name must be non-empty and without dots, got {name!r}")

    def _adopt(self, name: str) -> None:
        self.state.names.append(name)
        self.refresh()
        self._in_float32(name)

    def _in_float32(self, name: str) -> None:
        for parameter in self.parameters(name):
            parameter.data = parameter.data.float()  # master weights stay float32 under a half-precision base

    def _check_base(self, name: str, file: Path, metadata: dict[str, Any], allow_other_base: bool) -> None:
        theirs = metadata.get("base_fingerprint")
        if theirs is None or allow_other_base:
            return
        # 1e-3: half-precision copies of one model differ by 1e-5 in these means, another model by far more
        same = len(theirs) == len(self._fingerprint) and all(
            abs(a - b) <= 1e-3 * abs(b) for a, b in zip(theirs, self._fingerprint, strict=True)
        )
        if not same:
            raise ValueError(
                f"adapter {name!r} ({file}) was trained on another base model, {metadata.get('base')!r}; "
                "load that base, or pass allow_other_base=True to use it all the same"
            )

    def _check_fit(self, name: str, file: Path, state: dict[str, Tensor]) -> None:
        if not any(key.startswith("unet.") for key in state):
            raise ValueError(f"adapter {name!r}: no key of {file} starts with 'unet.', so it holds no denoiser LoRA")
        modules = dict(self.unet.named_modules())
        for key, tensor in state.items():
            path, _, side = key.removeprefix("unet.").partition(".lora_")
            module = modules.get(path) if key.startswith("unet.") else None
            weight = getattr(getattr(module, "base_layer", module), "weight", None)
            if weight is None:
                raise ValueError(f"adapter {name!r}: {file} adapts {path!r}, which this base model does not have")
            theirs, ours = (tensor.shape[1], weight.shape[1]) if side[0] == "A" else (tensor.shape[0], weight.shape[0])
            if theirs != ours:
                raise ValueError(
                    f"adapter {name!r}: {file} was made for another architecture: {path} is {theirs} wide there and "
                    f"{ours} here"
                )


@contextmanager
def _several_adapters() -> Iterator[None]:
    """Silence PEFT's warning that a model has more than one adapter: here that is the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield
