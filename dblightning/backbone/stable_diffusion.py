"""Stable Diffusion 1.x and 2.x, Stable Diffusion XL, and the miniature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dblightning.backbone.base import Conditioning, Size
from dblightning.backbone.family import Embeddings, Family, Guidance, Text, register

#: components that only SDXL has
XL_COMPONENTS = frozenset({"text_encoder_2", "tokenizer_2"})


class UNetFamily(Family):
    """Base class for Stable Diffusion and SDXL: a UNet with cross-attention, and a VAE."""

    takes_embeddings = True

    @property
    def guidance(self) -> Guidance:
        distilled = self.denoiser.config.time_cond_proj_dim is not None  # takes the scale as an input
        return "embedded" if distilled else "classifier-free"

    @property
    def size_step(self) -> int:
        return self.size_unit * int(2 ** (len(self.denoiser.config.block_out_channels) - 1))

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        unet, embeds = self.denoiser, conditioning.prompt_embeds
        inputs: dict[str, Any] = self.inputs(latents, conditioning)
        if self.guidance == "embedded":
            inputs["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(
                torch.full((len(latents),), float(guidance_scale) - 1), unet.config.time_cond_proj_dim
            ).to(latents.device, embeds.dtype)
        if conditioning.attention_kwargs:
            inputs["cross_attention_kwargs"] = dict(conditioning.attention_kwargs)
        output: Tensor = unet(
            latents.to(embeds.dtype), timesteps, encoder_hidden_states=embeds, return_dict=False, **inputs
        )[0]
        return output

    def inputs(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Further keywords of the UNet."""
        return {}

    def use_eager_attention(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        self.denoiser.set_attn_processor(AttnProcessor())


@register("StableDiffusionPipeline")
class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x; ``pooled`` is the end-of-text state."""

    has_verdicts = True
    load_options: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}

    @classmethod
    def assemble(cls, components: Mapping[str, Any]) -> Any | None:
        from diffusers import StableDiffusionPipeline

        if not components.keys().isdisjoint({"transformer", *XL_COMPONENTS}):
            return None
        checked = components.get("safety_checker") is not None
        defaults = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": checked}
        return StableDiffusionPipeline(**{**defaults, **components})

    @property
    def pooled_dim(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

    def encode(
        self, texts: Sequence[Text], device: torch.device, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor]:
        prompts = [text[0] or "" for text in texts]
        if clip_skip is not None and not hasattr(self.pipeline.text_encoder, "text_model"):
            embeds = self._encode_skipping(prompts, device, clip_skip)
        else:
            options: dict[str, Any] = {} if clip_skip is None else {"clip_skip": clip_skip}
            embeds, _ = self.pipeline.encode_prompt(prompts, device, 1, False, **options)
        return embeds, embeds[torch.arange(len(prompts)), self._end_of_text(prompts)]

    def pooled(self, embeds: Tensor, negative_embeds: Tensor | None, *pooled: Tensor | None) -> Embeddings:
        return embeds, embeds[:, -1], negative_embeds, None if negative_embeds is None else negative_embeds[:, -1]

    def _encode_skipping(self, texts: list[str], device: torch.device, clip_skip: int) -> Tensor:
        """An inner layer's output through the final norm, which diffusers looks for where transformers 4 had it."""
        encoder, tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        tokens = tokenizer(
            self.pipeline.maybe_convert_prompt(texts, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        states = encoder(
            tokens.input_ids, attention_mask=tokens.attention_mask if masked else None, output_hidden_states=True
        ).hidden_states
        embeds: Tensor = encoder.final_layer_norm(states[-(clip_skip + 1)])
        return embeds

    def _end_of_text(self, texts: list[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return (ids == tokenizer.eos_token_id).int().argmax(1)


@register("StableDiffusionXLPipeline")
class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL: two text encoders, and sizes as further inputs (``added["time_ids"]``)."""

    guidance_scale = 5.0

    @classmethod
    def assemble(cls, components: Mapping[str, Any]) -> Any | None:
        from diffusers import StableDiffusionXLPipeline

        own = XL_COMPONENTS & components.keys() and "transformer" not in components
        return StableDiffusionXLPipeline(**components) if own else None

    @property
    def pooled_dim(self) -> int:
        return int(self.pipeline.text_encoder_2.config.projection_dim)

    @property
    def zero_negative(self) -> bool:
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", True))

    @property
    def embeds_dtype(self) -> torch.dtype:
        encoder = self.pipeline.text_encoder_2
        dtype: torch.dtype = (self.denoiser if encoder is None else encoder).dtype
        return dtype

    @property
    def vae_in_float32(self) -> bool:
        # SD 1.5's config says so too, by diffusers' default; only SDXL's VAE overflows
        return bool(self.pipeline.vae.config.get("force_upcast", False))

    def encode(
        self, texts: Sequence[Text], device: torch.device, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if clip_skip is None else {"clip_skip": clip_skip}
        if any(second for _, *others in texts for second in others):
            options["prompt_2"] = [next(filter(None, others), first) for first, *others in texts]
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text[0] for text in texts],
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **options,
        )
        return embeds, pooled

    def pooled(self, embeds: Tensor, negative_embeds: Tensor | None, *pooled: Tensor | None) -> Embeddings:
        assert pooled[0] is not None
        return embeds, pooled[0], negative_embeds, pooled[1]

    def added(
        self, rows: int, like: Tensor, size: Size | None, **sizes: Any
    ) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor] | None]:
        """Original height and width, the crop's top and left, target height and width, in pixels: (rows, 6).

        The unconditional pass has its own where both of its sizes are given.
        """
        size = size or self.default_size

        def ids(prefix: str) -> dict[str, Tensor]:
            original, target = (sizes.get(f"{prefix}{name}") or size for name in ("original_size", "target_size"))
            crop = sizes.get(f"{prefix}crops_coords_top_left") or (0, 0)
            row = torch.tensor([[*original, *crop, *target]], dtype=like.dtype)
            return {"time_ids": row.to(like.device).expand(rows, -1)}

        own = sizes.get("negative_original_size") is not None and sizes.get("negative_target_size") is not None
        return ids(""), ids("negative_") if own else None

    def inputs(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        added = conditioning.added
        if added is None:
            height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[-2:])
            added, _ = self.added(len(latents), conditioning.prompt_embeds, conditioning.size or (height, width))
        return {"added_cond_kwargs": {"text_embeds": conditioning.pooled, **(added or {})}}
