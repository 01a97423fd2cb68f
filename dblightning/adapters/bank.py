"""The adapters of one frozen denoiser. PEFT creates and stores them; the forward is :mod:`gated`'s.

PEFT's ``set_adapter`` walks all modules (milliseconds) and is never called while sampling.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dblightning.adapters.files import (
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Form,
    LoraFactors,
    LoraFile,
    base_name,
    fingerprint,
    left_out,
    lora_config,
    peft_tensors,
    read_lora,
    write_lora,
)
from dblightning.adapters.gated import AUTOCAST_HOOK, GATED, GatedLayer, GateState, keep_float32, why_not

#: the paper's targets: query, key, value and output projections of every attention
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: elements that :meth:`AdapterBank._checksum` reads at once
CHUNK = 2**22


class AdapterBank:
    """The adapters of one denoiser: add, load, export, and choose per row (``gated``) or for all rows (``merged``).

    The model stays diffusers' own: what ``load_lora_weights``, ``delete_adapters``, ``unload_lora_weights`` and another
    bank on the same model do is followed at the next use. Refused by name at the next use are a fused LoRA (it would be
    part of "base"), and adapters chosen, scaled or switched off by ``set_adapters`` or ``disable_lora``: here each call
    says which adapters run, and how strongly.

    Args:
        denoiser: the frozen model, a diffusers model with PEFT support. Its parameters get ``requires_grad=False``;
            LoRAs it already has are taken over at full strength (with a warning where ``set_adapters`` scaled them).
        merged_limit: how many merged copies of the adapted matrices may be kept (one per gate vector in use).
        prefix: what the denoiser's keys in a LoRA file in diffusers' form start with.
        target_modules: the layers that a new adapter is put on, where none are named.

    Raises:
        ValueError: an adapter of the model cannot be gated; the model is as it was.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        merged_limit: int = 4,
        prefix: str = "unet",
        target_modules: Sequence[str] = ATTENTION,
    ) -> None:
        self.denoiser = denoiser
        self.prefix = prefix
        self.target_modules = tuple(target_modules)
        self.state = GateState()
        self.merged_limit = merged_limit
        self._merged_keys: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._layers: list[GatedLayer] = []
        self._sides: list[Tensor] = []
        self._layouts: list[tuple[tuple[int, float], ...]] = []  # the layers' distinct arrangements of adapters
        self._columns: list[tuple[int, ...]] = []  # and each one's columns of the gates
        self._on_device: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = {}  # as (columns, scales, columns)
        self._stacks: tuple[list[Tensor], list[Tensor]] = ([], [])  # (parts of the layers' stacks, what fills them)
        self._stacked = False
        self._installed: dict[str, Any] = {}  # the model's PEFT configs, as `refresh` found them
        self._position: Tensor | None = None
        _check_layers(_tuner_layers(denoiser))
        denoiser.requires_grad_(False)
        self._fingerprint = fingerprint(denoiser)
        self.state.names = list(self._configs())
        self.refresh()

    @property
    def unet(self) -> nn.Module:
        """The denoiser under its first name."""
        return self.denoiser

    @property
    def names(self) -> list[str]:
        """Adapters in gate order."""
        self._follow()
        return list(self.state.names)

    def layers(self) -> Iterator[GatedLayer]:
        """Every adapted layer."""
        self._follow()
        return iter(self._layers)  # kept by `refresh`: walking the modules takes milliseconds, too long for every step

    def add(
        self,
        name: str,
        rank: int = 4,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> None:
        """Create a new adapter, initially without effect (B = 0), and make it trainable in float32.

        Args:
            name: the adapter's name; by custom the reward it is trained on.
            rank: LoRA rank (paper: 4).
            lora_alpha: LoRA alpha; the scale is alpha / rank. Defaults to ``rank``, scale 1.
            target_modules: name endings of the linear layers and convolutions to adapt; None takes the bank's.
            seed: seed of A's initial values; None takes torch's global generator.

        Raises:
            ValueError: the name exists, no layer matches, or a matched layer cannot be adapted; nothing is added.
        """
        self._check_new(name)
        targets = self.target_modules if target_modules is None else target_modules
        config = LoraConfig(r=rank, lora_alpha=rank if lora_alpha is None else lora_alpha, target_modules=list(targets))
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with self._or_nothing(name), _several_adapters():
                try:
                    self.denoiser.add_adapter(config, adapter_name=name)  # type: ignore[operator]
                except ValueError as error:
                    raise ValueError(f"no adapter {name!r}: {error}") from error
                self._adopt(name)
        self.train_only(name)

    def load(self, name: str, path: str | Path, pipeline: Any, allow_other_base: bool = False) -> dict[str, Any]:
        """Load an adapter: LoRA, DoRA or ``lora_bias``, in diffusers', kohya's (A1111) or PEFT's form.

        What a file holds for text encoders is left out with a warning: an adapter here belongs to the denoiser.

        Args:
            name: its name here.
            path: a safetensors file, or a folder with one.
            pipeline: the diffusers pipeline that owns the denoiser, whose offloading hooks are suspended meanwhile.
            allow_other_base: load even if the adapter's metadata names another base model.

        Returns:
            The adapter's metadata (empty for a foreign file).

        Raises:
            FileNotFoundError: nothing there.
            ValueError: the name exists; the file holds no LoRA, or one for another architecture; it was trained on
                another base. Nothing is left in the model then.
        """
        self._check_new(name)
        try:
            file = read_lora(path, self._layers_per_block(), self.prefix)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no LoRA for adapter {name!r}: {error}") from error
        assert file.path is not None
        self._check_base(name, file.path, file.facts, allow_other_base)
        modules = self._fitting(name, file)
        if left_out(file):
            warnings.warn(
                f"adapter {name!r}: {file.path} also holds {left_out(file)}, which is not used: adapters here are "
                "the denoiser's alone, so images differ from plain diffusers', which adapts text encoders too",
                stacklevel=2,
            )
        if file.assumed:
            warnings.warn(f"adapter {name!r}: {file.assumed}", stacklevel=2)
        config = lora_config(modules, (each for each, _ in self._modules()))
        with self._or_nothing(name), _several_adapters():
            self.denoiser.load_lora_adapter(  # type: ignore[operator]
                {f"{self.prefix}.{key}": tensor for key, tensor in _peft_state(modules).items()},
                prefix=self.prefix,
                adapter_name=name,
                metadata={f"{self.prefix}.{key}": value for key, value in config.items()},
                _pipeline=pipeline,
            )
            self._adopt(name)
            self._check_loaded(name, modules)
            # once more: in a half-precision model PEFT has rounded them
            self.load_state_dict(name, _peft_state(modules))
        self.train_only(None)
        return file.facts

    def export(
        self,
        name: str,
        folder: str | Path,
        pipeline: Any,
        metadata: dict[str, Any] | None = None,
        format: Form = "diffusers",
    ) -> Path:
        """Write an adapter so that other programs load it.

        The file appears complete or not at all.

        Args:
            name: the adapter.
            folder: where the file goes; created if needed.
            pipeline: the diffusers pipeline that owns the denoiser.
            metadata: JSON-able facts to keep in the file: reward, kl_weight, step, command, …
            format: "diffusers", ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``; "kohya",
                ``<name>.safetensors`` for ComfyUI and A1111; or "peft", ``adapter_model.safetensors`` with its config.

        Returns:
            The file's path.

        Raises:
            ValueError: no such adapter, or a format that has no place for it.
        """
        self._check_known(name)
        facts = {
            "adapter": name,
            "base": base_name(pipeline),
            "base_fingerprint": self._fingerprint,
            **(metadata or {}),
        }
        config = self._configs()[name].to_dict()
        file = {"diffusers": WEIGHTS_NAME, "peft": PEFT_WEIGHTS_NAME}.get(format, f"{name}.safetensors")
        lora = LoraFile({self.prefix: self.factors(name)}, facts, denoiser=self.prefix)
        return write_lora(Path(folder) / file, lora, format, {self.prefix: config})

    def factors(self, name: str) -> dict[str, LoraFactors]:
        """The adapter's modules and their factors, detached and on the CPU."""
        found = {}
        for module, layer in self._modules():
            if isinstance(layer, GatedLayer) and name in layer.lora_A:
                down, up = layer.lora_A[name].weight, layer.lora_B[name]
                magnitude = layer.lora_magnitude_vector[name].weight.flatten() if layer.is_dora(name) else None
                parts = (None if each is None else each.detach().cpu().clone() for each in
                         (down, up.weight, up.bias, magnitude))  # fmt: skip
                weights: Any = list(parts)
                alpha = layer.alpha_scale(name) * layer.r[name]
                plain = layer.lora_alpha[name]
                found[module] = LoraFactors(
                    weights[0], weights[1], alpha if layer.use_rslora.get(name) else plain, weights[2], weights[3]
                )
        return found

    def settings(self, name: str) -> dict[str, Any]:
        """rank, lora_alpha and target_modules the adapter has, most of its modules' where they differ."""
        self._check_known(name)
        config = lora_config(self.factors(name), (each for each, _ in self._modules()))
        return {"rank": config["r"], "lora_alpha": config["lora_alpha"], "target_modules": config["target_modules"]}

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors as PEFT names them, detached and on the CPU."""
        state = get_peft_model_state_dict(self.denoiser, adapter_name=name)
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy tensors of :meth:`state_dict` into an existing adapter of the same shape.

        Raises:
            ValueError: keys that are missing or left over.
        """
        own = {
            _state_key(key, name): parameter
            for key, parameter in self.denoiser.named_parameters()
            if f".{name}." in key and ".lora_" in key
        }
        if set(own) != set(state):
            stray = sorted(set(own) ^ set(state))
            raise ValueError(f"the saved adapter does not match {name!r}; keys without a match: {stray[:5]}")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key].view_as(parameter))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's A and B matrices, with biases and magnitudes where it has them."""
        return [parameter for layer in self.layers() for parameter in layer.adapter_parameters(name)]

    def train_only(self, name: str | None) -> None:
        """Let gradients reach this adapter and no other (None: no adapter at all)."""
        for layer in self.layers():
            for key in layer.lora_A:
                for parameter in layer.adapter_parameters(key):
                    parameter.requires_grad_(key == name)

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

    def _enforce(self, snapshot: tuple[Any, ...]) -> None:
        state, merged = self.state, snapshot[2]
        if merged != state.merged:
            for layer in self._layers:  # past nn.Module's own __setattr__, which takes a microsecond per layer
                layer.__dict__["merged_weight"] = None if merged is None else layer.merged_weights.get(merged)
        state.gates, state.factors, state.merged, state.scales, state.strengths = snapshot

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

    @contextmanager
    def merged(self, gate: Sequence[float], factors: bool = False) -> Iterator[None]:
        """Forwards inside use W + ΔW of one gate vector for all rows, at the plain model's cost.

        The merged copies of the adapted matrices are kept, at most ``merged_limit`` of them.
        """
        self._check_use(any(gate))
        key = self._merge(tuple(float(value) for value in gate), factors) if any(gate) else None
        with self.restored((None, False, key, [], [])):
            yield

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
        """What merged copies depend on: the adapters' names, their values, and the base weights they are added to."""
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

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these adapters are all there are, in this order; the others wait at no cost.

        A gate vector has one entry per adapter and a gated layer computes every adapter it knows, so what is not used
        should not be there.

        Raises:
            ValueError: a name that is not loaded.
        """
        self._follow()
        for name in names:
            self._check_known(name)
        before = self.state.names
        if list(names) == before:
            yield
            return
        self._name(list(names))
        try:
            yield
        finally:
            self._name([name for name in before if name in self._configs()])

    def _name(self, names: list[str]) -> None:
        self.state.names = names
        for layer in self._layers:
            layer.index()
        self._lay_out()

    def _lay_out(self) -> None:
        """Find the layers' distinct arrangements of adapters: one or two, as a rule."""
        arrangements = [(layer.arrangement(), layer.columns()) for layer in self._layers]
        distinct = list(dict.fromkeys(arrangements))
        self._layouts, self._columns = [each for each, _ in distinct], [each for _, each in distinct]
        self._on_device.clear()
        self._stacked, self._stacks = False, ([], [])
        for layer, arrangement in zip(self._layers, arrangements, strict=True):
            layer.layout = distinct.index(arrangement)

    def remove(self, name: str) -> None:
        """Take an adapter out of the denoiser.

        Raises:
            ValueError: no such adapter.
        """
        self._check_known(name)
        self._discard(name)

    def drop_merged(self) -> None:
        """Free every merged copy."""
        self._merged_keys.clear()
        for layer in self.layers():
            layer.merged_weights.clear()

    def refresh(self) -> None:
        """Re-index all layers; called after adapters were added, or the model was moved to another device.

        Raises:
            ValueError: an adapter that cannot be gated, before any layer is changed.
        """
        layers = _tuner_layers(self.denoiser)
        _check_layers(layers)
        configs = self._configs()
        scaled: dict[str, float] = {}
        for module in layers:
            if not isinstance(module, GatedLayer):
                _unhook(module)
                # same class but for `forward`: so adapters read by diffusers' own loader become gated as they are
                module.__class__ = GATED[type(module)]
            assert isinstance(module, GatedLayer)
            module.install(self.state)
            for name, scale in module.own_scaling.items():
                if module.scaling[name] != scale:
                    scaled[name] = module.scaling[name] / scale
                module.scaling[name] = scale
                keep_float32(module, name)
            # all are "active" for PEFT; the gates choose. Assigned: PEFT's own setter would make all trainable
            module._active_adapter = list(configs)
        self._layers = layers  # type: ignore[assignment]
        self._sides = [
            each for layer in self._layers for name in layer.lora_A for each in layer.adapter_parameters(name)
        ]
        self._merged_keys.clear()
        self._installed = configs
        self._lay_out()
        if scaled:
            warnings.warn(
                "the scales given by set_adapters() are not taken over: "
                + ", ".join(f"{name!r} was at {scale:g} and is at full strength" for name, scale in scaled.items())
                + "; say the strength per call, by weights= or kl_scale=",
                stacklevel=3,
            )

    def _configs(self) -> dict[str, Any]:
        """The model's adapters as PEFT has them: name → config."""
        return dict(getattr(self.denoiser, "peft_config", None) or {})

    def _follow(self) -> None:
        """Take over what happened to the model's adapters by other means than this bank's."""
        configs = self._configs()
        same = configs.keys() == self._installed.keys() and all(
            configs[name] is self._installed[name] for name in configs
        )
        if same and (not self._layers or self._layers[0].gate_state is self.state):
            return
        gone = not configs and bool(self._installed)
        kept = [name for name in self.state.names if name in configs]
        before, self.state.names = self.state.names, kept + [name for name in configs if name not in self._installed]
        try:
            self.refresh()
        except ValueError:
            self.state.names = before
            raise
        if gone:  # the base may have been changed for good: fuse_lora(), then unload_lora_weights()
            self._fingerprint = fingerprint(self.denoiser)

    def _check_use(self, adapted: bool) -> None:
        """Raises ValueError if diffusers' own methods have set the model's adapters otherwise than the gates say."""
        self._follow()
        installed = list(self._installed)
        for layer in self._layers:
            if layer.merged_adapters:
                raise ValueError(
                    f"adapter {layer.merged_adapters[0]!r} is fused into the base weights by fuse_lora(), so even the "
                    "base model would contain it; call unfuse_lora() first"
                )
            if not adapted:
                continue
            if layer.scaling != layer.own_scaling:
                name = next(name for name in layer.scaling if layer.scaling[name] != layer.own_scaling.get(name))
                raise ValueError(
                    f"adapter {name!r} was given the scale {layer.scaling[name] / layer.own_scaling[name]:g} by "
                    "set_adapters(), which a blend would not know of; say the strength per call, by weights= or "
                    f"kl_scale=, and call set_adapters({installed}) to take the scale back"
                )
            if layer._disable_adapters:
                raise ValueError(
                    "the adapters are switched off by disable_lora(); call enable_lora(), or use method='base'"
                )
            if layer._active_adapter != installed:
                raise ValueError(
                    f"set_adapters() has chosen {layer._active_adapter}, but each call chooses adapters by weights=; "
                    f"call set_adapters({installed}) to take the choice back"
                )

    @contextmanager
    def _or_nothing(self, name: str) -> Iterator[None]:
        """What is done inside to add an adapter is undone if it fails."""
        try:
            yield
        except BaseException:
            self._discard(name)
            raise

    def _discard(self, name: str) -> None:
        """Take an adapter out, and the layers that cannot be gated with it."""
        self.state.names = [each for each in self.state.names if each != name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"Adapter {name} was active")
            self.denoiser.delete_adapters(name)  # type: ignore[operator]
        for path, module in list(self.denoiser.named_modules()):
            if isinstance(module, BaseTunerLayer) and not isinstance(module, GatedLayer) and why_not(module):
                parent, _, child = path.rpartition(".")
                setattr(self.denoiser.get_submodule(parent), child, module.get_base_layer())
        self.refresh()

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the denoiser that are its own, not an adapter's."""
        for name, module in self.denoiser.named_modules():
            if ".lora_" not in name and not name.endswith(".base_layer"):
                yield name, module

    def _layers_per_block(self) -> int:
        count = getattr(getattr(self.denoiser, "config", None), "layers_per_block", 2)
        return count if isinstance(count, int) else 2

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"no adapter {name!r} is loaded; the names are {self.state.names}")

    def _check_new(self, name: str) -> None:
        if name in self.names:
            raise ValueError(f"an adapter named {name!r} is loaded already; the names are {self.state.names}")
        if not name or "." in name:
            raise ValueError(f"an adapter's name must be non-empty and without dots, got {name!r}")

    def _adopt(self, name: str) -> None:
        self.state.names.append(name)
        self.refresh()

    def _check_base(self, name: str, file: Path, metadata: dict[str, Any], allow_other_base: bool) -> None:
        theirs = metadata.get("base_fingerprint")
        if theirs is None or allow_other_base:
            return
        # half-precision copies of one model differ by 1e-5 in these means and 8-bit ones by 1e-2, another model by more
        eight_bits = any(parameter.element_size() == 1 for parameter in self.denoiser.parameters())
        tolerance = 2e-2 if eight_bits else 1e-3
        same = len(theirs) == len(self._fingerprint) and all(
            abs(a - b) <= tolerance * abs(b) for a, b in zip(theirs, self._fingerprint, strict=True)
        )
        if not same:
            raise ValueError(
                f"adapter {name!r} ({file}) was trained on another base model, {metadata.get('base')!r}; "
                "load that base, or pass allow_other_base=True to use it all the same"
            )

    def _fitting(self, name: str, file: LoraFile) -> dict[str, LoraFactors]:
        """The file's factors for the denoiser, in its modules' shapes."""
        modules = file.modules.get(file.denoiser, {})
        own = dict(self._modules())
        if not any(module in own for module in modules) and (not modules or file.foreign):
            others = left_out(file)
            raise ValueError(
                f"adapter {name!r}: no key of {file.path} starts with '{self.prefix}.' or 'lora_unet_' or names a "
                f"module of the denoiser, so it holds no denoiser LoRA{f', only {others}' if others else ''}"
            )
        return {module: self._fit(name, file, module, own.get(module), each) for module, each in modules.items()}

    def _fit(
        self, name: str, file: LoraFile, module: str, layer: nn.Module | None, factors: LoraFactors
    ) -> LoraFactors:
        base = getattr(layer, "base_layer", layer)
        weight = getattr(base, "weight", None)
        if weight is None:
            raise ValueError(f"adapter {name!r}: {file.path} adapts {module!r}, which this base model does not have")
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"adapter {name!r}: {file.path} adapts {module!r}, a {type(base).__name__}; only linear layers and 2-D "
                "convolutions can be adapted"
            )
        down, up = factors.down, factors.up
        if down.ndim != weight.ndim and max(down.shape[2:], default=1) == 1 and max(weight.shape[2:], default=1) == 1:
            ones = [1] * (weight.ndim - 2)  # a 1×1 convolution written as a matrix, or a matrix as a 1×1 convolution
            down, up = down.view(*down.shape[:2], *ones), up.view(*up.shape[:2], *ones)
        theirs = (len(up), *down.shape[1:])
        if theirs != tuple(weight.shape) or up.ndim != weight.ndim or max(up.shape[2:], default=1) > 1:
            raise ValueError(
                f"adapter {name!r}: {file.path} was made for another architecture: {module} is "
                f"{'×'.join(map(str, theirs))} there and {'×'.join(map(str, weight.shape))} here"
            )
        return LoraFactors(down, up, factors.alpha, factors.bias, factors.magnitude)

    def _check_loaded(self, name: str, modules: dict[str, LoraFactors]) -> None:
        """Raises ValueError if the model does not hold the modules, ranks and scales of a file."""
        here = self.factors(name)
        wrong = sorted(here.keys() ^ modules.keys())
        wrong += [
            module
            for module, each in modules.items()
            if module in here
            and (here[module].down.shape != each.down.shape or abs(here[module].alpha - each.alpha) > 1e-9)
        ]
        if wrong:
            raise ValueError(f"adapter {name!r} did not load completely; modules without a match: {wrong[:5]}")


def _tuner_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers that PEFT has put adapters on."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _check_layers(layers: Sequence[nn.Module]) -> None:
    """Raises ValueError if a layer cannot be gated."""
    for layer in layers:
        reason = why_not(layer)
        if reason:
            raise ValueError(reason)


def _peft_state(modules: dict[str, LoraFactors]) -> dict[str, Tensor]:
    return {key: tensor for module, each in modules.items() for key, tensor in peft_tensors(module, each).items()}


def _state_key(parameter: str, name: str) -> str:
    """A parameter's key in :meth:`AdapterBank.state_dict`."""
    key = parameter.replace(f".{name}.", ".")
    return key.removesuffix(".weight") if ".lora_magnitude_vector" in key else key


def _unhook(layer: nn.Module) -> None:
    """Let a layer's class decide its forward again, where diffusers' layerwise casting has put PEFT's in its place.

    That hook keeps PEFT from casting inputs; a gated layer casts none.
    """
    hooks = getattr(layer, "_diffusers_hook", None)
    if hooks is not None and "forward" in layer.__dict__:
        hooks.remove_hook(AUTOCAST_HOOK, recurse=False)
        layer.__dict__.pop("forward")


@contextmanager
def _several_adapters() -> Iterator[None]:
    """Silence PEFT's warning that a model has more than one adapter: here that is the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield
