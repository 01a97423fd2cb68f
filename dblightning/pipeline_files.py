"""Making a pipeline from files, components or another pipeline, and saving it with its adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from dblightning.backbone import FAMILIES, DiffusersBackbone, load_pipeline
from dblightning.miniature import EMBEDDED
from dblightning.pipeline_lora import LoraMethods
from dblightning.prompt_cache import has_lora

#: file of a saved pipeline that names its adapters, which lie in ``adapters/<name>``
INDEX_NAME = "dblightning.json"


class FileMethods(LoraMethods):
    """diffusers' methods that load, convert and save a pipeline, for one that is made of a ``backbone``."""

    def __init__(self, backbone: DiffusersBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        torch_dtype: Any = None,
        variant: str | None = None,
        scheduler: Any = None,
        allow_other_base: bool = False,
        dtype: Any = None,
        **options: Any,
    ) -> Self:
        """Load a base model and adapters.

        Args:
            base: pipeline folder, hub id, "miniature" or "miniature-flow". A folder that :meth:`save_pretrained`
                wrote brings its adapters and its scheduler, a miniature its shipped adapters, unless others are named.
            adapters: name → folder or file of a LoRA in diffusers' format.
            dtype, torch_dtype: precision of the base (default float32), or component → precision; adapters and latents
                stay float32.
            variant: weight variant of the base's files, such as "fp16".
            scheduler: a diffusers scheduler; None is DDIM with the base's noise schedule, or a flow's own.
            allow_other_base: load adapters that were trained on another base all the same.
            options: further keywords of diffusers' ``from_pretrained``: components (``vae=…``), ``revision``,
                ``cache_dir``, ``local_files_only``, ``use_safetensors``, ``device_map``, ….

        Raises:
            FileNotFoundError: base or adapter not there.
            ValueError: an adapter that does not fit the base, or a scheduler that clips.
        """
        precision = dtype if dtype is not None else torch_dtype if torch_dtype is not None else torch.float32
        pipeline = load_pipeline(str(base), precision, variant, **options)
        folder = Path(base).expanduser()
        index = folder / INDEX_NAME
        saved = json.loads(index.read_text()) if index.is_file() else None
        pipe = cls(DiffusersBackbone.from_pipeline(pipeline))
        family = pipe.backbone.family
        if scheduler is not None:
            family.check_scheduler(scheduler.config)
            pipeline.scheduler = scheduler
        elif saved is None and pipeline.scheduler is not None:
            pipeline.scheduler = family.default_scheduler()
        embedded = EMBEDDED.get(str(base))
        if embedded is not None and embedded.text_tokens is not None:
            family.max_sequence_length = embedded.text_tokens
        if adapters is None and embedded is not None:
            adapters = embedded.adapters()
        elif adapters is None and saved is not None:
            adapters = {name: folder / "adapters" / name for name in saved["adapters"]}
        for name, path in (adapters or {}).items():
            pipe.load_adapter(name, path, allow_other_base)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """Wrap a diffusers pipeline with the LoRAs it has (``load_lora_weights(path, adapter_name=...)``).

        The components are shared, and the LoRA layers become gated in place: from now on ``pipeline`` itself runs the
        base model, and adapters are chosen by ``weights`` here. The pipeline's scheduler is kept. Components assigned
        to one are the other's too.

        Args:
            pipeline: what to wrap.
            options: components or settings to replace, as in diffusers' ``from_pipe``; ``pipeline`` keeps its own.

        Raises:
            ValueError: a pipeline of another kind, LoRA on layers that are not linear, or a fused LoRA.
        """
        if isinstance(pipeline, FileMethods):
            pipeline = pipeline.backbone.pipeline
        if options:
            precision = {} if {"dtype", "torch_dtype"} & options.keys() else {"dtype": pipeline.dtype}
            pipeline = type(pipeline).from_pipe(pipeline, **precision, **options)
        return cls(DiffusersBackbone.from_pipeline(pipeline))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the base pipeline as diffusers writes it, without the adapters, and each adapter beside it.

        Plain diffusers loads the folder as the base model, and ``folder/adapters/<name>`` as a LoRA;
        :meth:`from_pretrained` loads all of it.

        Args:
            save_directory: the folder.
            options: diffusers' keywords: ``safe_serialization``, ``variant``, ``max_shard_size``.

        Raises:
            ValueError: a LoRA on a text encoder, or ``push_to_hub``.
        """
        pipeline = self.backbone.pipeline
        if options.get("push_to_hub"):
            raise ValueError("push_to_hub would leave the adapters behind; save to a folder and upload the folder")
        if any(has_lora(encoder) for encoder in self.backbone.text_encoders):
            raise ValueError(
                "a text encoder carries a LoRA, which would be saved as weights nobody can load; unload it"
            )
        names = [] if self.backbone.denoiser is None else self.adapters.names
        plain = unadapted(self.backbone) if has_lora(self.backbone.denoiser) else pipeline
        plain.save_pretrained(save_directory, **options)
        for name in names:
            self.adapters.export(name, Path(save_directory) / "adapters" / name, pipeline, self._metadata.get(name))
        (Path(save_directory) / INDEX_NAME).write_text(json.dumps({"adapters": names}))


def assembled(components: dict[str, Any]) -> Any:
    """A plain pipeline of components.

    Raises:
        ValueError: components of no known family.
    """
    for family in reversed(FAMILIES.values()):  # those added last come first
        pipeline = family.assemble(components)
        if pipeline is not None:
            return pipeline
    raise ValueError(f"no family of models has the components {sorted(components)}; the families are {list(FAMILIES)}")


def unadapted(backbone: DiffusersBackbone) -> Any:
    """A pipeline of the same components whose denoiser shares the base weights and has no adapter layers."""
    pipeline, denoiser = backbone.pipeline, getattr(backbone.denoiser, "_orig_mod", backbone.denoiser)
    weights = {
        key.replace(".base_layer.", "."): value for key, value in denoiser.state_dict().items() if ".lora_" not in key
    }
    with torch.device("meta"):
        plain = type(denoiser).from_config(denoiser.config)
    plain.load_state_dict(weights, assign=True)
    parts = {**pipeline.components, backbone.family.denoiser_name: plain}
    made = type(pipeline)(**parts, **pipeline.parameters)
    made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
    return made
