"""The adapters of one frozen denoiser. PEFT creates and stores them; the forward is :mod:`gated`'s.

PEFT's ``set_adapter`` visits all modules (milliseconds) and is never called while sampling.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dblightning.adapters.files import PEFT_WEIGHTS_NAME, WEIGHTS_NAME, Form, read_lora, write_lora
from dblightning.adapters.fit import base_name, check_base, fit
from dblightning.adapters.forwards import AdapterForwards
from dblightning.adapters.gated import GatedLayer, why_not
from dblightning.adapters.lora import LoraFactors, LoraFile, left_out, lora_config, peft_tensors

#: the paper's targets: query, key, value and output projections of every attention
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class AdapterBank(AdapterForwards):
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
        self.prefix = prefix
        self.target_modules = tuple(target_modules)
        super().__init__(denoiser, merged_limit)

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
        if not allow_other_base:
            check_base(name, file, self.denoiser, self._fingerprint)
        modules = fit(name, file, dict(self._modules()))
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

    def train_only(self, name: str | Sequence[str] | None) -> None:
        """Let gradients reach this adapter, or these, and no other (None: no adapter at all)."""
        trained = [name] if isinstance(name, str | None) else list(name)
        for layer in self.layers():
            for key in layer.lora_A:
                for parameter in layer.adapter_parameters(key):
                    parameter.requires_grad_(key in trained)

    def remove(self, name: str) -> None:
        """Take an adapter out of the denoiser.

        Raises:
            ValueError: no such adapter.
        """
        self._check_known(name)
        self._discard(name)

    @contextmanager
    def _or_nothing(self, name: str) -> Iterator[None]:
        """A context in which an adapter is added; a failure undoes everything done inside."""
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

    def _check_new(self, name: str) -> None:
        if name in self.names:
            raise ValueError(f"an adapter named {name!r} is loaded already; the names are {self.state.names}")
        if not name or "." in name:
            raise ValueError(f"an adapter's name must be non-empty and without dots, got {name!r}")

    def _adopt(self, name: str) -> None:
        self.state.names.append(name)
        self.refresh()

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


def _peft_state(modules: dict[str, LoraFactors]) -> dict[str, Tensor]:
    return {key: tensor for module, each in modules.items() for key, tensor in peft_tensors(module, each).items()}


def _state_key(parameter: str, name: str) -> str:
    """A parameter's key in :meth:`AdapterBank.state_dict`."""
    key = parameter.replace(f".{name}.", ".")
    return key.removesuffix(".weight") if ".lora_magnitude_vector" in key else key


@contextmanager
def _several_adapters() -> Iterator[None]:
    """Silence PEFT's warning that a model has more than one adapter: here that is the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield
