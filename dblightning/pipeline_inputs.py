"""The inputs of a pipeline call that describe its images, made into the conditioning as diffusers makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import silence_text_adapters
from dblightning.backbone import Conditioning, DiffusersBackbone, Text
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
    prompt_3: Texts | None = None
    negative_prompt_3: Texts | None = None
    max_sequence_length: int | None = None

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
        if backbone.family.takes("pooled_prompt_embeds"):
            names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        return {name: getattr(self, name) for name in names}

    def check(self, backbone: DiffusersBackbone) -> None:
        """Raises ValueError for inputs of another model, and for numbers of texts that do not fit."""
        check_taken(backbone, [name for name, value in vars(self).items() if value is not None])
        for name in ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"):
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
        check_taken(backbone, [name for name, value in vars(self).items() if value not in (None, (0, 0))])


def check_taken(backbone: DiffusersBackbone, names: Sequence[str]) -> None:
    """Raises ValueError for arguments that the wrapped pipeline's own call does not have."""
    stray = [name for name in names if not backbone.family.takes(name)]
    if stray:
        kind = type(backbone.pipeline).__name__
        raise ValueError(f"{stray[0]} is not an argument of a {kind}; leave it out for this model")


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
    return backbone.sized(conditioning, size, **vars(sizes))._replace(
        guidance_rescale=call.guidance_rescale,
        lora_scale=float(scale),
        attention_kwargs=attention or None,
    )


def repeated(values: Texts | None, count: int, each: int) -> list[str] | None:
    """One text for each of ``count`` · ``each`` images, a prompt's images side by side; one text serves all."""
    if values is None:
        return None
    texts = [values] * count if isinstance(values, str) else list(values)
    return [text for text in texts for _ in range(each)]


def _from_texts(backbone: DiffusersBackbone, inputs: TextInputs, call: CallSettings, per_prompt: int) -> Conditioning:
    """All from texts, through the backbone's cache."""

    def texts(first: Texts | None, *others: Texts | None) -> list[Text]:
        none: list[str | None] = [None] * (inputs.count * per_prompt)
        further = [repeated(other, inputs.count, per_prompt) or none for other in others]
        return list(zip(repeated(first or "", inputs.count, per_prompt) or [], *further, strict=True))

    embeds, pooled, negative_embeds, negative_pooled = backbone.embed(
        texts(inputs.prompt, inputs.prompt_2, inputs.prompt_3),
        texts(inputs.negative_prompt, inputs.negative_prompt_2, inputs.negative_prompt_3),
        call.clip_skip,
        thorough=True,
        max_sequence_length=inputs.max_sequence_length,
    )
    if inputs.negative_prompt is None and backbone.family.zero_negative:
        negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return Conditioning(embeds, pooled, negative_embeds, negative_pooled)


def _from_embeddings(
    backbone: DiffusersBackbone, inputs: TextInputs, call: CallSettings, per_prompt: int
) -> Conditioning:
    """Embeddings that the caller gave, some or all; the wrapped pipeline makes those that are missing."""
    count, pipeline = inputs.count, backbone.pipeline
    texts: dict[str, Any] = {"prompt": inputs.prompt, "negative_prompt": repeated(inputs.negative_prompt, count, 1)}
    for name in ("prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"):
        if backbone.family.takes(name):
            texts[name] = repeated(getattr(inputs, name), count, 1)
    if inputs.max_sequence_length is not None:
        texts["max_sequence_length"] = inputs.max_sequence_length
    makes_negative = inputs.negative_prompt_embeds is None and not (
        backbone.family.zero_negative and inputs.negative_prompt is None
    )
    if call.guided and makes_negative and pipeline.tokenizer is None:
        raise ValueError("guidance needs negative_prompt_embeds, or a text encoder to make them; or guidance_scale=1")
    silence_text_adapters(pipeline)
    options = {
        "device": backbone.device,
        "num_images_per_prompt": per_prompt,
        "do_classifier_free_guidance": call.guided,
        "clip_skip": call.clip_skip,
    }
    with backbone.lock:
        embeds, pooled, negative_embeds, negative_pooled = backbone.family.complete(
            texts, inputs.embeddings(backbone), options
        )
    call.has_negatives = negative_embeds is not None
    if negative_embeds is None or negative_pooled is None:
        negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return Conditioning(embeds, pooled.to(embeds), negative_embeds, negative_pooled.to(embeds))
