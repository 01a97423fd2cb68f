"""A pipeline's adapters under diffusers' names: load, choose, list, delete; what blends cannot do is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import WEIGHTS_NAME, AdapterBank
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import Blend, BlendPlan, BlendStep

#: diffusers' methods that cannot hold for blends, each with what to do instead
REFUSED = {
    "fuse_lora": "the base model stays apart from its adapters; pass weights={'name': 1.0} (a single gate already runs "
    "on merged weights), or fuse in a plain pipeline",
    "load_lora_into_unet": "use load_lora_weights(path, adapter_name='name')",
    "load_lora_into_transformer": "use load_lora_weights(path, adapter_name='name')",
    "load_lora_into_text_encoder": "adapters here belong to the denoiser; use load_lora_weights(path)",
    "set_lora_device": "adapters live where the denoiser lives; use pipe.to(device), or delete_adapters('name')",
    "enable_lora_hotswap": "load adapters under names of their own and choose with weights=",
    "load_ip_adapter": "image prompts are not blended; use a plain pipeline for an IP-Adapter",
    "set_ip_adapter_scale": "image prompts are not blended; use a plain pipeline for an IP-Adapter",
    "enable_sequential_cpu_offload": "sequential offload moves single layers, behind the gated layers' back; use "
    "enable_model_cpu_offload()",
}


class ActiveAdapters(Blend):
    """The adapters that ``set_adapters`` made active, as in diffusers: W + Σᵢ wᵢ ΔWᵢ with any weights."""

    def __init__(self, active: Mapping[str, float]) -> None:
        self.active = dict(active)

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        gate = torch.tensor([self.active.get(name, 0.0) for name in adapters])
        step = BlendStep(gate.expand(1, batch, -1), torch.ones(1, batch, dtype=torch.float64))
        return lambda step_index: step


class LoraMethods:
    """diffusers' methods for LoRAs, on a pipeline's ``backbone``."""

    backbone: DiffusersBackbone

    def __init__(self) -> None:
        self._metadata: dict[str, dict[str, Any]] = {}
        self._active: dict[str, float] | None = None  # of set_adapters
        self._lora_enabled = True

    @property
    def adapters(self) -> AdapterBank:
        """The adapters; ``pipe.adapters.names``, ``pipe.adapters.merged_limit``, ``pipe.adapters.drop_merged()``."""
        return self.backbone.adapters

    def load_adapter(self, name: str, path: str | Path, allow_other_base: bool = False) -> dict[str, Any]:
        """Load a LoRA under a name and return its metadata; see :meth:`AdapterBank.load`."""
        if any(getattr(each, "fused_projections", False) for each in self.backbone.denoiser.modules()):
            raise ValueError("fused projections bypass adapters; call unfuse_qkv_projections() before loading one")
        metadata = self.adapters.load(name, path, self.backbone.pipeline, allow_other_base)
        self._metadata[name] = metadata
        return metadata

    def load_lora_weights(
        self,
        path: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        allow_other_base: bool = False,
        **hub: Any,
    ) -> None:
        """Load a LoRA as diffusers does: it becomes the active adapter, used by calls without ``weights``.

        Args:
            path: folder, file, hub id, or a state dict.
            adapter_name: its name; None counts up: default_0, default_1, …
            weight_name: the file in the folder or hub repository.
            allow_other_base: see :meth:`AdapterBank.load`.
            hub: ``subfolder``, ``revision``, ``cache_dir``, ``local_files_only``, ``token``, … of a hub id.
        """
        if hub.pop("hotswap", False):
            raise ValueError(f"hotswap is not for blends: {REFUSED['enable_lora_hotswap']}")
        hub.pop("low_cpu_mem_usage", None)
        if adapter_name is None:
            taken = self.adapters.names
            adapter_name = next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(path, Mapping):
                from safetensors.torch import save_file

                file = Path(folder) / WEIGHTS_NAME
                save_file({key: value.contiguous() for key, value in path.items()}, file)
            else:
                file = lora_file(path, weight_name, hub)
            self.load_adapter(adapter_name, file, allow_other_base)
        self.set_adapters(adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make adapters active, as in diffusers: a call without ``weights`` then runs W + Σᵢ wᵢ ΔWᵢ.

        Args:
            adapter_names: one name, or several.
            adapter_weights: one for all, or one each, of any size; None is 1.

        Raises:
            ValueError: a name that is not loaded, or weights per block.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        values = [1.0 if value is None else value for value in given]
        unknown = [name for name in names if name not in self.adapters.names]
        if unknown:
            raise ValueError(f"no adapter {unknown[0]!r} is loaded; the names are {self.adapters.names}")
        if len(values) != len(names):
            raise ValueError(f"got {len(values)} adapter_weights for {len(names)} adapters; give one each")
        if any(isinstance(value, Mapping) for value in values):
            raise ValueError("adapter_weights per block are not supported; give one number per adapter")
        self._active = {name: float(value) for name, value in zip(names, values, strict=True)}
        self._lora_enabled = True

    def get_active_adapters(self) -> list[str]:
        """The adapters that a call without ``weights`` uses."""
        return [name for name in self._active or {} if name in self.adapters.names] if self._lora_enabled else []

    def default_blend(self) -> Blend | None:
        """The blend of a call that names none: the active adapters, or the base model where there are none to choose.

        None where adapters are loaded and nobody said which to use.
        """
        if self._active is None and self.adapters.names and self._lora_enabled:
            return None
        return ActiveAdapters({name: (self._active or {})[name] for name in self.get_active_adapters()})

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters of each component."""
        return {self.backbone.family.denoiser_name: self.adapters.names} if self.adapters.names else {}

    def disable_lora(self) -> None:
        """Calls without ``weights`` run the base model."""
        self._lora_enabled = False

    def enable_lora(self) -> None:
        """Undo :meth:`disable_lora`."""
        self._lora_enabled = True

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out.

        Raises:
            ValueError: a name that is not loaded; then nothing is deleted.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        unknown = [name for name in names if name not in self.adapters.names]
        if unknown:
            raise ValueError(f"no adapter {unknown[0]!r} is loaded; the names are {self.adapters.names}")
        for name in names:
            self.adapters.remove(name)
            self._metadata.pop(name, None)
            if self._active is not None:
                self._active.pop(name, None)

    def unload_lora_weights(self, **options: Any) -> None:
        """Take all adapters out, and the LoRAs of the text encoders; the base model is left."""
        self.delete_adapters(self.adapters.names)
        self.backbone.pipeline.unload_lora_weights(**options)
        self.adapters.refresh()
        self._active, self._lora_enabled = None, True

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As in diffusers, while no adapters are loaded."""
        if unet and self.adapters.names:
            raise ValueError(f"fused projections would bypass the adapters {self.adapters.names}; delete them first")
        self.backbone.pipeline.fuse_qkv_projections(unet=unet, vae=vae)


def lora_file(path: str | Path, weight_name: str | None, hub: Mapping[str, Any]) -> Path:
    """The LoRA file of a folder, a file path, or a hub id (downloaded)."""
    options = dict(hub)
    subfolder = options.pop("subfolder", None) or ""
    local = Path(path).expanduser() / subfolder
    if local.is_file():
        return local
    if local.is_dir() or str(path).count("/") != 1:
        return local if weight_name is None else local / weight_name
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(str(path), weight_name or WEIGHTS_NAME, subfolder=subfolder or None, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"no LoRA at {str(path)!r}: neither a local folder nor a hub repository with {weight_name or WEIGHTS_NAME} "
            f"({type(error).__name__}); give the exported folder, or weight_name="
        ) from error
    return Path(found)
