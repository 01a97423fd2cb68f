"""Flow-matching transformers: Stable Diffusion 3 and 3.5, and FLUX.1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dblightning.backbone.base import Conditioning, Prediction, Size
from dblightning.backbone.family import Embeddings, Family, Guidance, Text, register
from dblightning.flow import dynamic_mu
from dblightning.flow_solver import is_flow

#: the attention of both streams, what flow_grpo, DiffusionNFT and Flow-Factory adapt in SD3
JOINT_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
#: their layers in FLUX's double blocks; the single blocks' queries, keys and values match "attn." too
FLUX_TARGETS = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class FlowTransformer(Family):
    """Base class for flow-matching transformers: the path, the prediction, and a schedule that knows the image's size.

    The rule of ``schedule_options`` is the plain pipeline's: σ's from the scheduler or a grid, shifted by its own rule.
    """

    denoiser_name = "transformer"
    lora_prefix = "transformer"
    takes_embeddings = True
    #: the class of the denoiser, by which components are told apart
    denoiser_class: ClassVar[str]
    #: how many text encoders the plain pipeline's ``encode_prompt`` takes a text for
    text_encoders: ClassVar[int]

    @classmethod
    def owns(cls, components: Mapping[str, Any]) -> bool:
        """Whether the components' denoiser is this family's."""
        names = [each.__name__ for each in type(components.get("transformer")).__mro__]
        return cls.denoiser_class in names

    @property
    def prediction(self) -> Prediction:
        return "velocity"

    def check_scheduler(self, scheduler_config: Mapping[str, Any]) -> None:
        if not is_flow(scheduler_config):
            raise ValueError(
                f"a {type(self.pipeline).__name__} predicts velocities and its scheduler "
                f"({scheduler_config.get('_class_name', 'one with β’s')}) is not of flow matching; use "
                "FlowMatchEulerDiscreteScheduler"
            )

    def default_scheduler(self) -> Any:
        self.check_scheduler(self.pipeline.scheduler.config)
        return self.pipeline.scheduler

    def tokens(self, size: Size) -> int:
        """Number of image tokens that the transformer sees of an image of ``size`` in pixels."""
        return (size[0] // self.size_unit) * (size[1] // self.size_unit)

    def grid(self, num_inference_steps: int) -> list[float] | None:
        """The plain pipeline's σ's before the shift; None leaves them to the scheduler."""
        return None

    def schedule_options(self, num_inference_steps: int | None, size: Size | None = None) -> dict[str, Any]:
        size = size or self.default_size
        self.check_size(size)
        options: dict[str, Any] = {}
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            options["mu"] = self._mu(size, config)
        grid = None if num_inference_steps is None else self.grid(num_inference_steps)
        if grid is not None and not config.get("use_flow_sigmas"):
            options["sigmas"] = grid
        return options

    def check_size(self, size: Size) -> None:
        """Raises ValueError for a size in pixels that the transformer has no positions for."""

    def _mu(self, size: Size, config: Mapping[str, Any]) -> float:
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        tokens = self.tokens(size)
        if not least <= tokens <= most:
            raise ValueError(
                f"the scheduler's shift is made for {least} to {most} image tokens (base_image_seq_len, "
                f"max_image_seq_len), and an image of {size[0]}×{size[1]} pixels has {tokens}; choose another size"
            )
        shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return dynamic_mu(tokens, least, most, *shifts)

    @property
    def pooled_dim(self) -> int:
        return int(self.denoiser.config.pooled_projection_dim)

    def encode(
        self,
        texts: Sequence[Text],
        device: torch.device,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = max_sequence_length or self.max_sequence_length
        options = {"device": device, "clip_skip": clip_skip, "max_sequence_length": length}
        return self._encode(options, *(self._texts(texts, each) for each in range(self.text_encoders)))

    @abstractmethod
    def _encode(self, options: Mapping[str, Any], *texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and pooled of each text encoder's texts, by the plain pipeline's ``encode_prompt``."""

    def _texts(self, texts: Sequence[Text], encoder: int) -> list[str]:
        """The texts of one encoder; the first's where it has none of its own."""
        return [(text[encoder] if len(text) > encoder else None) or text[0] or "" for text in texts]


@register("StableDiffusion3Pipeline")
class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which may be absent (its embedding is then zero)."""

    denoiser_class = "SD3Transformer2DModel"
    target_modules = JOINT_ATTENTION
    repeated_blocks = ("JointTransformerBlock",)
    guidance_scale = 7.0
    max_sequence_length = 256
    text_encoders = 3

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(
            source, **{name: options[name] for name in ("cache_dir", "revision", "token", "local_files_only")
                       if name in options}
        )  # fmt: skip
        # a folder saved without T5, which plain from_pretrained refuses
        absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None]
        return super().load(source, **{**dict.fromkeys(absent), **options})

    @classmethod
    def assemble(cls, components: Mapping[str, Any]) -> Any | None:
        from diffusers import StableDiffusion3Pipeline

        if not cls.owns(components):
            return None
        return StableDiffusion3Pipeline(**{"text_encoder_3": None, "tokenizer_3": None, **components})

    @property
    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor) * int(self.denoiser.config.patch_size)

    def check_size(self, size: Size) -> None:
        most = int(self.denoiser.config.pos_embed_max_size)
        if max(size) // self.size_unit > most:
            raise ValueError(
                f"an image of {size[0]}×{size[1]} pixels has more than the {most} positions a side that this "
                f"transformer knows (pos_embed_max_size); at most {most * self.size_unit} pixels a side"
            )

    def _encode(self, options: Mapping[str, Any], *texts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(*texts, do_classifier_free_guidance=False, **options)
        return embeds, pooled

    def complete(
        self, texts: Mapping[str, Any], embeddings: Mapping[str, Tensor | None], options: Mapping[str, Any]
    ) -> Embeddings:
        unit = self.size_unit
        everything = {"prompt_2": None, "prompt_3": None, "max_sequence_length": self.max_sequence_length, **texts}
        self.pipeline.check_inputs(height=unit, width=unit, **everything, **embeddings)
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(**everything, **embeddings, **options)
        return embeds, pooled, negative, negative_pooled

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        embeds = conditioning.prompt_embeds
        attention = conditioning.attention_kwargs
        output: Tensor = self.denoiser(
            hidden_states=latents.to(embeds.dtype),
            timestep=timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning.pooled.to(embeds.dtype),
            joint_attention_kwargs=dict(attention) if attention else None,
            return_dict=False,
        )[0]
        return output


@register("FluxPipeline")
class Flux(FlowTransformer):
    """FLUX.1: CLIP's pooled embedding and T5, 2×2 latent patches as tokens, guidance as an input of the transformer.

    A transformer without ``guidance_embeds`` (schnell) ignores the guidance scale, as the plain pipeline does.
    """

    denoiser_class = "FluxTransformer2DModel"
    target_modules = FLUX_TARGETS
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    guidance_scale = 3.5
    max_sequence_length = 512
    text_encoders = 2

    @classmethod
    def assemble(cls, components: Mapping[str, Any]) -> Any | None:
        from diffusers import FluxPipeline

        return FluxPipeline(**components) if cls.owns(components) else None

    @property
    def guidance(self) -> Guidance:
        return "embedded"

    @property
    def default_size(self) -> Size:
        side = self.resolution or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return int(side), int(side)

    @property
    def size_unit(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        height, width = (2 * (side // self.size_unit) for side in size)
        return int(self.denoiser.config.in_channels) // 4, height, width

    @property
    def embeds_dtype(self) -> torch.dtype:
        encoder = self.pipeline.text_encoder_2
        dtype: torch.dtype = (self.denoiser if encoder is None else encoder).dtype
        return dtype

    def grid(self, num_inference_steps: int) -> list[float] | None:
        grid: list[float] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        return grid

    def _encode(self, options: Mapping[str, Any], *texts: list[str]) -> tuple[Tensor, Tensor]:
        if options.get("clip_skip") is not None:
            raise ValueError(
                f"clip_skip is not an argument of a {type(self.pipeline).__name__}, got {options['clip_skip']}"
            )
        own = {name: value for name, value in options.items() if name != "clip_skip"}
        embeds, pooled, _ = self.pipeline.encode_prompt(*texts, **own)
        return embeds, pooled

    def complete(
        self, texts: Mapping[str, Any], embeddings: Mapping[str, Tensor | None], options: Mapping[str, Any]
    ) -> Embeddings:
        prompts = {name: texts.get(name) for name in ("prompt", "prompt_2")}
        own = {name: embeddings.get(name) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        self.pipeline.check_inputs(height=self.size_unit, width=self.size_unit, **prompts, **own)
        embeds, pooled, _ = self.pipeline.encode_prompt(
            **prompts,
            **own,
            device=options["device"],
            num_images_per_prompt=options["num_images_per_prompt"],
            max_sequence_length=texts.get("max_sequence_length") or self.max_sequence_length,
        )
        return embeds, pooled, None, None

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        pipeline, embeds, device = self.pipeline, conditioning.prompt_embeds, latents.device
        rows, channels, height, width = latents.shape
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((rows,), float(guidance_scale), device=device)
        tokens: Tensor = self.denoiser(
            hidden_states=pipeline._pack_latents(latents.to(embeds.dtype), rows, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning.pooled.to(embeds.dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=embeds.dtype),
            img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, device, embeds.dtype),
            joint_attention_kwargs=dict(conditioning.attention_kwargs or {}),
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        unpacked: Tensor = pipeline._unpack_latents(tokens, height * factor, width * factor, factor)
        return unpacked
