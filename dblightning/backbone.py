"""A diffusers pipeline as the parts the algorithm needs: encode prompts, denoise with gates, decode.

``Backbone`` is the interface; ``DiffusersBackbone`` serves Stable Diffusion 1.x/2.x, SDXL and the miniature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dblightning.adapters import AdapterBank

DType = Literal["float32", "bfloat16", "float16"]
#: what the denoisers are made of, by diffusers' class names
REPEATED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
#: compiled forms of one block's code: a dozen sizes in SDXL, times base, gated and merged
COMPILED_VARIANTS = 64


class Conditioning(NamedTuple):
    """What the denoiser is told about B prompts."""

    prompt_embeds: Tensor  # (B, L, D) text encoder output
    pooled: Tensor  # (B, P) one vector per prompt: SDXL's pooled embedding, else the end-of-text state
    negative_prompt_embeds: Tensor  # (B, L, D)
    negative_pooled: Tensor  # (B, P)

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of rows ``index``, int64 (R,)."""
        return Conditioning(*(part[index.to(part.device)] for part in self))


class Backbone(nn.Module, ABC):
    """A frozen denoiser with adapters. Latents are float32 (B, C, h, w); images float (B, 3, H, W) in [0, 1]."""

    adapters: AdapterBank
    #: rows the denoiser has run since the count was last set to 0; guidance's second pass is not counted apart
    rows_run: int = 0

    @property
    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule, as in a diffusers scheduler's config."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""

    @property
    @abstractmethod
    def pooled_dim(self) -> int:
        """P, the size of ``Conditioning.pooled``."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None = None) -> Conditioning:
        """Conditioning of B prompts; each text is encoded once and cached.

        ``negative_prompt`` None means none given: the empty text, or zeros where the pipeline says so (SDXL).
        """

    @abstractmethod
    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        gates: Tensor | None = None,
        factors: bool = False,
        merged: Sequence[float] | None = None,
    ) -> Tensor:
        """Model output of R rows with classifier-free guidance applied.

        Args:
            latents: (R, C, h, w), float32.
            timesteps: scheduler timesteps, int64 (R,).
            conditioning: R rows.
            guidance_scale: classifier-free guidance; 1 turns it off (and halves the cost).
            gates: (R, m), a gate vector per row; None is the base model.
            factors: see :class:`dblightning.blending.BlendStep`.
            merged: instead of ``gates``, one gate vector for all rows, run on merged weights.

        Returns:
            (R, C, h, w), float32; ε, v or x₀ as ``scheduler_config["prediction_type"]`` says.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32, differentiable."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Backbone:
        """Always evaluation mode: the frozen model has no dropout to switch on."""
        return super().train(False)


class DiffusersBackbone(Backbone):
    """Stable Diffusion 1.x/2.x or SDXL through diffusers.

    Args:
        pretrained: a local pipeline folder, a hub id, or "miniature" for the embedded pipeline.
        dtype: precision of the frozen weights. Adapters, latents and log-probs stay float32.
        vae_dtype: precision of the VAE; None takes ``dtype``, or float32 where the VAE's config forces it (SDXL).
        resolution: image side in pixels; None takes the model's own.
        variant: weight variant of the files, such as "fp16".
        attention: "sdpa", torch's fused kernel, or "eager", plain matrix products (slower; for comparison).
        gradient_checkpointing: recompute activations in the backward pass; much less memory, a third more time.
        channels_last: memory layout that speeds up convolutions on GPUs.
        compile: torch.compile of the denoiser: its repeated "blocks" (residual and transformer; one after the other, so
            that equal ones are compiled once), or the "whole" of it (fuses more, takes minutes at the first call).
        decode_batch_size: images decoded at once.
        prompt_cache_size: how many prompts' embeddings are kept.

    Raises:
        FileNotFoundError: no model there; the message says what to do.
        ValueError: a pipeline of a kind this class does not serve.
    """

    def __init__(
        self,
        pretrained: str = "miniature",
        dtype: DType = "float32",
        vae_dtype: DType | None = None,
        resolution: int | None = None,
        variant: str | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: Literal["none", "blocks", "whole"] = "none",
        decode_batch_size: int = 16,
        prompt_cache_size: int = 4096,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        pipeline = load_pipeline(pretrained, getattr(torch, dtype), variant)
        self._wrap(pipeline, vae_dtype, resolution, decode_batch_size, prompt_cache_size)
        if attention == "eager":
            from diffusers.models.attention_processor import AttnProcessor

            self.unet.set_attn_processor(AttnProcessor())
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()
        self.compile_denoiser(compile)

    @classmethod
    def from_pipeline(cls, pipeline: Any, resolution: int | None = None) -> DiffusersBackbone:
        """Wrap a loaded StableDiffusionPipeline or StableDiffusionXLPipeline; its denoiser is frozen in place."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        backbone.pretrained = str(pipeline.config.get("_name_or_path") or "")
        backbone._wrap(pipeline, None, resolution, decode_batch_size=16, prompt_cache_size=4096)
        return backbone

    def _wrap(
        self,
        pipeline: Any,
        vae_dtype: DType | None,
        resolution: int | None,
        decode_batch_size: int,
        prompt_cache_size: int,
    ) -> None:
        kind = type(pipeline).__name__
        if not kind.startswith(("StableDiffusionPipeline", "StableDiffusionXLPipeline")):
            raise ValueError(
                f"{self.pretrained!r} is a {kind}; supported are StableDiffusionPipeline and ...XLPipeline"
            )
        self.pipeline = pipeline
        self.is_xl = kind.startswith("StableDiffusionXL")
        self.unet: Any = pipeline.unet
        self.vae: Any = pipeline.vae.requires_grad_(False)
        self.text_encoder: Any = pipeline.text_encoder.requires_grad_(False)
        if self.is_xl:
            self.text_encoder_2: Any = pipeline.text_encoder_2.requires_grad_(False)
        if vae_dtype is None and pipeline.vae.config.get("force_upcast", False):
            # SD 1.5's config says so too, by diffusers' default; only SDXL's VAE overflows in half precision
            vae_dtype = "float32" if self.is_xl else None
        if vae_dtype is not None:
            self.vae.to(getattr(torch, vae_dtype))
        self.decode_batch_size = decode_batch_size
        self.prompt_cache_size = prompt_cache_size
        self._prompt_cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        factor = pipeline.vae_scale_factor
        self.resolution = resolution or int(pipeline.unet.config.sample_size) * factor
        if self.resolution % (factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)):
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of "
                f"{factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)} for this model"
            )
        self.adapters = AdapterBank(self.unet)
        self.eval()

    @property
    def device(self) -> torch.device:
        hook = getattr(self.unet, "_hf_hook", None)  # model offload: weights wait on the CPU and compute elsewhere
        place = getattr(hook, "execution_device", None)
        return super().device if place is None else torch.device(place)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        return dict(self.pipeline.scheduler.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.pipeline.vae_scale_factor
        return int(self.pipeline.unet.config.in_channels), side, side

    @property
    def pooled_dim(self) -> int:
        if self.is_xl:
            return int(self.text_encoder_2.config.projection_dim)
        return int(self.text_encoder.config.hidden_size)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, under the gates the forward had."""

        def checkpoint(module: nn.Module, *args: Any) -> Any:
            snapshot = self.adapters.snapshot()

            def run(*inputs: Any) -> Any:
                with self.adapters.restored(snapshot):
                    return module(*inputs)

            return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

        self.unet.enable_gradient_checkpointing(checkpoint)

    def compile_denoiser(self, what: Literal["none", "blocks", "whole"], **options: Any) -> None:
        """Compile at the next call, see ``compile`` above; ``options`` are torch.compile's.

        The base, the gated and the merged forward are compiled apart, and each size of a block.
        """
        if what not in ("none", "blocks", "whole"):
            raise ValueError(f"compile must be none, blocks or whole, got {what!r}")
        if what == "none":
            return
        # blocks share their code, so torch counts their sizes and forwards together; its limit of 8 is soon reached
        torch._dynamo.config.recompile_limit = max(COMPILED_VARIANTS, torch._dynamo.config.recompile_limit)
        if what == "whole":
            self.unet.compile(**options)
            return
        for module in self.unet.modules():
            if type(module).__name__ in REPEATED_BLOCKS:
                module.compile(**options)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None = None) -> Conditioning:
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string; pass [prompt]")
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * len(prompts)
        else:
            negatives = list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts")
        self._fill_cache([*prompts, *negatives])
        embeds, pooled = zip(*(self._prompt_cache[text] for text in prompts), strict=True)
        negative_embeds, negative_pooled = zip(*(self._prompt_cache[text] for text in negatives), strict=True)
        conditioning = Conditioning(*map(torch.stack, (embeds, pooled, negative_embeds, negative_pooled)))
        if negative_prompt is None and self.is_xl and self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            conditioning = conditioning._replace(
                negative_prompt_embeds=torch.zeros_like(conditioning.prompt_embeds),
                negative_pooled=torch.zeros_like(conditioning.pooled),
            )
        while len(self._prompt_cache) > self.prompt_cache_size:
            self._prompt_cache.popitem(last=False)
        return conditioning

    def _fill_cache(self, texts: Sequence[str]) -> None:
        if self._prompt_cache:
            cached = next(iter(self._prompt_cache.values()))[0]
            if (cached.device, cached.dtype) != (self.device, self.text_encoder.dtype):
                self._prompt_cache.clear()
        missing = [text for text in dict.fromkeys(texts) if text not in self._prompt_cache]
        for start in range(0, len(missing), 64):
            chunk = missing[start : start + 64]
            if self.is_xl:
                embeds, _, pooled, _ = self.pipeline.encode_prompt(
                    chunk, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            else:
                embeds, _ = self.pipeline.encode_prompt(chunk, self.device, 1, False)
                pooled = embeds[torch.arange(len(chunk)), self._end_of_text(chunk)]
            self._prompt_cache.update(zip(chunk, zip(embeds, pooled, strict=True), strict=True))

    def _end_of_text(self, texts: list[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return (ids == tokenizer.eos_token_id).int().argmax(1)

    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        gates: Tensor | None = None,
        factors: bool = False,
        merged: Sequence[float] | None = None,
    ) -> Tensor:
        guided = guidance_scale > 1
        self.rows_run += len(latents)
        embeds, pooled, negative_embeds, negative_pooled = conditioning
        if guided:
            embeds, pooled = torch.cat([negative_embeds, embeds]), torch.cat([negative_pooled, pooled])
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            gates = None if gates is None else torch.cat([gates, gates])
        extra = {"text_embeds": pooled, "time_ids": self._time_ids(len(latents), embeds)} if self.is_xl else None
        bank = self.adapters
        use = bank.gated(gates, factors) if merged is None else bank.merged(merged, factors)
        with use:
            output = self.unet(
                latents.to(embeds.dtype),
                timesteps,
                encoder_hidden_states=embeds,
                added_cond_kwargs=extra,
                return_dict=False,
            )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _time_ids(self, rows: int, like: Tensor) -> Tensor:
        side = self.resolution
        return torch.tensor([[side, side, 0, 0, side, side]], device=like.device, dtype=like.dtype).expand(rows, -1)

    def decode(self, latents: Tensor) -> Tensor:
        chunks = (latents / self.vae.config.scaling_factor).to(self.vae.dtype).split(self.decode_batch_size)
        images = [self.vae.decode(chunk, return_dict=False)[0].float() for chunk in chunks]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def load_pipeline(pretrained: str, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Any:
    """A diffusers text-to-image pipeline, safety checker off.

    Args:
        pretrained: local folder, hub id, or "miniature".
        dtype: precision of all weights.
        variant: weight variant of the files.

    Raises:
        FileNotFoundError: nothing loadable there; one sentence says what to download or where to point.
    """
    from diffusers import DiffusionPipeline

    if pretrained == "miniature":
        from dblightning import miniature

        pretrained = str(miniature.path())
    advice = (
        f"no diffusers pipeline at {pretrained!r}: set --model.backbone.init_args.pretrained to a local pipeline "
        "folder or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5 (download it once with `hf download "
        '<id>`), or to "miniature"'
    )
    looks_local = pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1
    if looks_local and not (Path(pretrained).expanduser() / "model_index.json").is_file():
        raise FileNotFoundError(advice)
    source = str(Path(pretrained).expanduser()) if Path(pretrained).expanduser().is_dir() else pretrained
    try:
        kind = DiffusionPipeline.load_config(source)["_class_name"]
        off = {} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variant, **off)
    except OSError as error:  # huggingface_hub's errors for a missing model or network are OSErrors
        raise FileNotFoundError(f"{advice} ({type(error).__name__}: {str(error).splitlines()[0]})") from error
