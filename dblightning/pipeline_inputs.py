"""The inputs of a pipeline call that describe its images, made into the conditioning as diffusers makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import silence_text_adapters
from dblightning.backbone import Conditioning, DiffusersBackbone
from dblightning.pipeline_call import CallSettings

Texts = str | Sequence[str]


@dataclass
class TextInputs:
    """Prompts or their embeddings, under the names that diffusers' pipelines give them."""

    prompt: list[str] | None = None
    prompt_2: Texts | None = None
    negative_prompt: Texts | None = None
    negative_prompt_2: Texts | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of prompts."""
        if self.prompt is not None:
            return len(self.prompt)
        assert self.prompt_embeds is not None
        return len(self.prompt_embeds)

    def embeddings(self, backbone: DiffusersBackbone) -> dict[str, Tensor | None]:
        """Those of the four embeddings that the model has, by name."""
        names = ["prompt_embeds", "negative_prompt_embeds"]
        if backbone.is_xl:
            names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        return {name: getattr(self, name) for name in names}

    def check(self, backbone: DiffusersBackbone) -> None:
        """Raises ValueError for inputs of another model, and for numbers of texts that do not fit."""
        xl_only = ("prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        stray = [name for name in xl_only if getattr(self, name) is not None]
        if stray and not backbone.is_xl:
            raise ValueError(f"{stray[0]} belongs to SDXL; leave it out for this model")
        for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
            texts = getattr(self, name)
            if texts is not None and not isinstance(texts, str) and len(texts) != self.count:
                kind = "negative prompts" if name == "negative_prompt" else f"texts of {name}"
                raise ValueError(f"got {len(texts)} {kind} for {self.count} prompts; give one for all, or one each")


@dataclass
class SizeInputs:
    """SDXL's size conditioning, (height, width) and (top, left) in pixels, under diffusers' names."""

    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None

    def check(self, backbone: DiffusersBackbone) -> None:
        """Raises ValueError for sizes given to a model that takes none."""
        if not backbone.is_xl and self != SizeInputs():
            stray = [name for name, value in vars(self).items() if value not in (None, (0, 0))]
            raise ValueError(f"{stray[0]} belongs to SDXL; leave it out for this model")

    def ids(self, backbone: DiffusersBackbone, rows: int, size: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
        """``Conditioning.size`` and, where both of its sizes are given, ``negative_size``; none for other models."""
        if not backbone.is_xl:
            return {}
        made = {
            "size": backbone.size_ids(
                rows, like, size, self.original_size, self.crops_coords_top_left, self.target_size
            )
        }
        if self.negative_original_size is not None and self.negative_target_size is not None:
            made["negative_size"] = backbone.size_ids(
                rows,
                like,
                size,
                self.negative_original_size,
                self.negative_crops_coords_top_left,
                self.negative_target_size,
            )
        return made


def condition(
    backbone: DiffusersBackbone,
    inputs: TextInputs,
    sizes: SizeInputs,
    call: CallSettings,
    per_prompt: int,
    size: tuple[int, int],
) -> Conditioning:
    """Conditioning of the images of a call, a prompt's images side by side.

    Args:
        backbone: the model.
        inputs, sizes: checked.
        call: guidance, ``clip_skip`` and ``cross_attention_kwargs`` are read; ``has_negatives`` is set.
        per_prompt: images of each prompt.
        size: height and width in pixels.
    """
    scale = (call.cross_attention_kwargs or {}).get("scale", 1.0)
    given = [each for each in inputs.embeddings(backbone).values() if each is not None]
    make = _from_embeddings if given else _from_texts
    conditioning = make(backbone, inputs, call, per_prompt)
    attention = {key: value for key, value in (call.cross_attention_kwargs or {}).items() if key != "scale"}
    return conditioning._replace(
        **sizes.ids(backbone, inputs.count * per_prompt, size, conditioning.prompt_embeds),
        guidance_rescale=call.guidance_rescale,
        lora_scale=float(scale),
        attention_kwargs=attention or None,
    )


def embeds_dtype(backbone: DiffusersBackbone) -> torch.dtype:
    """Precision of the embeddings, in which diffusers draws its noise."""
    encoder = backbone.text_encoder_2 if backbone.is_xl else backbone.text_encoder
    dtype: torch.dtype = (backbone.unet if encoder is None else encoder).dtype
    return dtype


def repeated(values: Texts | None, count: int, each: int) -> list[str] | None:
    """One text for each of ``count`` · ``each`` images, a prompt's images side by side; one text serves all."""
    if values is None:
        return None
    texts = [values] * count if isinstance(values, str) else list(values)
    return [text for text in texts for _ in range(each)]


def _from_texts(backbone: DiffusersBackbone, inputs: TextInputs, call: CallSettings, per_prompt: int) -> Conditioning:
    """All from texts, through the backbone's cache."""

    def pairs(first: Texts | None, second: Texts | None) -> list[tuple[str, str | None]]:
        none: list[str | None] = [None] * (inputs.count * per_prompt)
        seconds = repeated(second, inputs.count, per_prompt) or none
        return list(zip(repeated(first or "", inputs.count, per_prompt) or [], seconds, strict=True))

    embeds, pooled, negative_embeds, negative_pooled = backbone.embed(
        pairs(inputs.prompt, inputs.prompt_2),
        pairs(inputs.negative_prompt, inputs.negative_prompt_2),
        call.clip_skip,
        thorough=True,
    )
    if inputs.negative_prompt is None and backbone.zero_negative:
        negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return Conditioning(embeds, pooled, negative_embeds, negative_pooled)


def _from_embeddings(
    backbone: DiffusersBackbone, inputs: TextInputs, call: CallSettings, per_prompt: int
) -> Conditioning:
    """Embeddings that the caller gave, some or all; the wrapped pipeline makes those that are missing."""
    count, pipeline = inputs.count, backbone.pipeline
    texts: dict[str, Any] = {"prompt": inputs.prompt, "negative_prompt": repeated(inputs.negative_prompt, count, 1)}
    if backbone.is_xl:
        texts["prompt_2"] = repeated(inputs.prompt_2, count, 1)
        texts["negative_prompt_2"] = repeated(inputs.negative_prompt_2, count, 1)
    embeddings = inputs.embeddings(backbone)
    pipeline.check_inputs(height=8, width=8, callback_steps=None, **texts, **embeddings)
    makes_negative = inputs.negative_prompt_embeds is None and not (
        backbone.zero_negative and inputs.negative_prompt is None
    )
    if call.guided and makes_negative and pipeline.tokenizer is None:
        raise ValueError("guidance needs negative_prompt_embeds, or a text encoder to make them; or guidance_scale=1")
    silence_text_adapters(pipeline)
    with backbone.lock:
        made = pipeline.encode_prompt(
            device=backbone.device,
            num_images_per_prompt=per_prompt,
            do_classifier_free_guidance=call.guided,
            clip_skip=call.clip_skip,
            **texts,
            **embeddings,
        )
    embeds, negative_embeds = made[0], made[1]
    pooled, negative_pooled = made[2:] if backbone.is_xl else (embeds[:, -1], None)
    call.has_negatives = negative_embeds is not None
    if negative_embeds is None:
        negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    elif negative_pooled is None:
        negative_pooled = negative_embeds[:, -1]
    return Conditioning(embeds, pooled.to(embeds), negative_embeds, negative_pooled.to(embeds))
