"""A diffusers pipeline as the parts the algorithm needs: encode prompts, denoise with gates, decode.

``Backbone`` is the interface; ``DiffusersBackbone`` serves Stable Diffusion 1.x/2.x, SDXL and the miniature.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dblightning.adapters import AdapterBank, silence_text_adapters
from dblightning.prompt_cache import PromptCache, text_state

DType = Literal["float32", "bfloat16", "float16"]
#: what the denoisers are made of, by diffusers' class names
REPEATED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
#: compiled forms of one block's code: a dozen sizes in SDXL, times base, gated and merged
COMPILED_VARIANTS = 64
#: the pipeline's components that a backbone computes with
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")

#: where a hub model is looked for
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")

_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(owner: Any) -> Any:
    """The lock of a denoiser, the same for every backbone that wraps it; a copy of the denoiser has its own."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(owner, threading.RLock())


class Conditioning(NamedTuple):
    """What the denoiser is told about B prompts."""

    prompt_embeds: Tensor  # (B, L, D) text encoder output
    pooled: Tensor  # (B, P) one vector per prompt: SDXL's pooled embedding, else the end-of-text state
    negative_prompt_embeds: Tensor  # (B, L, D)
    negative_pooled: Tensor  # (B, P)
    #: SDXL: original height and width, the crop's top and left, target height and width, in pixels, (B, 6); None: the
    #: backbone's own resolution
    size: Tensor | None = None
    negative_size: Tensor | None = None  # (B, 6), of guidance's unconditional pass; None: ``size``
    guidance_rescale: float = 0.0  # φ in [0, 1] of Lin et al. 2023, eq. (16)
    lora_scale: float = 1.0  # scales every adapter's ΔW
    attention_kwargs: Mapping[str, Any] | None = None  # handed to the attention processors

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of rows ``index``, int64 (R,)."""
        parts = {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}
        chosen: dict[str, Any] = {name: part[index.to(part.device)] for name, part in parts.items()}
        return self._replace(**chosen)

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same in another precision."""
        made: dict[str, Any] = {
            name: part.to(dtype) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        return self._replace(**made)


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
        prompt_cache_bytes: how much memory they may take.

    ``unet``, ``vae`` and the text encoders are the pipeline's: they are read there at each use, and assigning one here
    assigns it there.

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
        prompt_cache_bytes: int = 2**30,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        pipeline = load_pipeline(pretrained, getattr(torch, dtype), variant)
        self._wrap(pipeline, resolution, decode_batch_size, PromptCache(prompt_cache_size, prompt_cache_bytes))
        if vae_dtype is None and self.is_xl and pipeline.vae.config.get("force_upcast", False):
            vae_dtype = "float32"  # SD 1.5's config says so too, by diffusers' default; only SDXL's VAE overflows
        if vae_dtype is not None:
            self.vae.to(getattr(torch, vae_dtype))
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
        backbone._wrap(pipeline, resolution, decode_batch_size=16, prompt_cache=PromptCache(4096, 2**30))
        return backbone

    def _wrap(self, pipeline: Any, resolution: int | None, decode_batch_size: int, prompt_cache: PromptCache) -> None:
        kind = type(pipeline).__name__
        if not kind.startswith(("StableDiffusionPipeline", "StableDiffusionXLPipeline")):
            raise ValueError(
                f"{self.pretrained!r} is a {kind}; supported are StableDiffusionPipeline and ...XLPipeline"
            )
        self.pipeline = pipeline
        self.is_xl = kind.startswith("StableDiffusionXL")
        self.decode_batch_size = decode_batch_size
        self._prompt_cache = prompt_cache
        self._own_resolution = resolution
        self._bank: AdapterBank | None = None
        for name in COMPONENTS:
            component = getattr(pipeline, name, None)
            if component is not None:
                component.requires_grad_(False)
        if pipeline.unet is not None:
            if self.resolution % self.size_step:
                raise ValueError(f"resolution {self.resolution} must be a multiple of {self.size_step} for this model")
            assert self.adapters is not None  # refuses LoRAs it cannot gate
        silence_text_adapters(pipeline)
        self.eval()

    # ── the components, read from the pipeline ───────────────────────────────────────────────────────────────────────

    @property
    def _modules(self) -> dict[str, nn.Module | None]:
        """Submodules as torch sees them, to move, count or save them: whatever the pipeline has now."""
        pipeline = self.__dict__.get("pipeline")
        found = {name: getattr(pipeline, name, None) for name in COMPONENTS}
        return {name: component for name, component in found.items() if isinstance(component, nn.Module)}

    @_modules.setter
    def _modules(self, value: Any) -> None:
        """What nn.Module's constructor sets is not needed."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMPONENTS:
            setattr(self.pipeline, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.text_encoder

    @property
    def text_encoder_2(self) -> Any:
        return getattr(self.pipeline, "text_encoder_2", None)

    @property
    def adapters(self) -> AdapterBank:  # type: ignore[override]
        """The adapters of the pipeline's denoiser; a denoiser assigned since brings its own LoRAs."""
        unet = self.pipeline.unet
        if unet is None:
            raise ValueError("the pipeline has no unet, so there are no adapters and nothing to denoise with; set one")
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile(unet) wraps the same weights
        if self._bank is None or self._bank.unet is not unet:
            self._bank = AdapterBank(unet, *([] if self._bank is None else [self._bank.merged_limit]))
        return self._bank

    @property
    def lock(self) -> Any:
        """Held while the gates are set for a denoiser call: one denoiser serves one call at a time."""
        unet = self.pipeline.unet
        return lock_of(self.pipeline if unet is None else getattr(unet, "_orig_mod", unet))

    @property
    def device(self) -> torch.device:
        unet = self.unet
        place = getattr(getattr(unet, "_hf_hook", None), "execution_device", None)
        if place is not None:  # model offload: weights wait on the CPU and compute elsewhere
            return torch.device(place)
        if unet is not None and any(hasattr(each, "_diffusers_hook") for each in (unet, *unet.children())):
            return torch.device(self.pipeline._execution_device)  # group offload
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    @property
    def can_merge(self) -> bool:
        """Whether merged copies of the weights may stand in for them: not where hooks move or cast the weights."""
        unet = self.unet
        hooked = any(hasattr(each, "_diffusers_hook") for each in (unet, *unet.children()))
        return not (hooked or hasattr(unet, "_hf_hook"))

    @property
    def scheduler_config(self) -> dict[str, Any]:
        return dict(self.pipeline.scheduler.config)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels, where none are asked for."""
        if self._own_resolution is not None:
            return self._own_resolution, self._own_resolution
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return int(height) * self.pipeline.vae_scale_factor, int(width) * self.pipeline.vae_scale_factor

    @property
    def resolution(self) -> int:
        """Image side in pixels."""
        return self.default_size[0]

    @property
    def size_step(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        height, width = self.default_size
        return int(self.unet.config.in_channels), height // factor, width // factor

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
                with self.lock, self.adapters.restored(snapshot):
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
        embeds, pooled, negative_embeds, negative_pooled = self.embed(
            [(text, None) for text in prompts], [(text, None) for text in negatives]
        )
        conditioning = Conditioning(embeds, pooled, negative_embeds, negative_pooled)
        if self.is_xl:
            conditioning = conditioning._replace(size=self.size_ids(len(prompts), embeds))
            if negative_prompt is None and self.zero_negative:
                conditioning = conditioning._replace(
                    negative_prompt_embeds=torch.zeros_like(embeds), negative_pooled=torch.zeros_like(pooled)
                )
        return conditioning

    @property
    def zero_negative(self) -> bool:
        """Whether the unconditional pass has zeros for embeddings where no negative prompt is given (SDXL)."""
        return self.is_xl and bool(self.pipeline.config.get("force_zeros_for_empty_prompt", True))

    @torch.no_grad()
    def embed(
        self,
        prompts: Sequence[tuple[str, str | None]],
        negatives: Sequence[tuple[str, str | None]],
        clip_skip: int | None = None,
        thorough: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings of texts, each encoded once and cached as long as the text encoders stay what they are.

        Args:
            prompts: B texts, each with the second text encoder's text (None: the same).
            negatives: B texts likewise.
            clip_skip: last layers of the text encoders to leave out, of the prompts' embeddings (as in diffusers).
            thorough: look for changed text encoders more closely, see :func:`dblightning.prompt_cache.text_state`.

        Returns:
            Embeddings (B, L, D) and pooled (B, P) of the prompts, then of the negatives.
        """
        cache = self._prompt_cache
        keys = [(*pair, clip_skip or None) for pair in prompts]  # 0 leaves out nothing
        negative_keys = [(*pair, None) for pair in negatives]
        silence_text_adapters(self.pipeline)
        with self.lock:
            cache.made_by(text_state(self.pipeline, thorough))
            missing = [key for key in dict.fromkeys([*keys, *negative_keys]) if key not in cache]
            for skip in dict.fromkeys(key[2] for key in missing):
                group = [key for key in missing if key[2] == skip]
                for start in range(0, len(group), 64):
                    chunk = group[start : start + 64]
                    cached = self._encode_texts([key[0] for key in chunk], [key[1] for key in chunk], skip)
                    for key, embeds, pooled in zip(chunk, *cached, strict=True):
                        cache[key] = (embeds, pooled)
            found = [zip(*(cache[key] for key in each), strict=True) for each in (keys, negative_keys)]
            stacked = [torch.stack(part) for pair in found for part in pair]
            cache.trim()
        return stacked[0], stacked[1], stacked[2], stacked[3]

    def _encode_texts(
        self, texts: list[str], seconds: list[str | None], clip_skip: int | None
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if clip_skip is None else {"clip_skip": clip_skip}
        if not self.is_xl:
            if clip_skip is not None and not hasattr(self.text_encoder, "text_model"):
                embeds = self._encode_skipping(texts, clip_skip)
            else:
                embeds, _ = self.pipeline.encode_prompt(texts, self.device, 1, False, **options)
            return embeds, embeds[torch.arange(len(texts)), self._end_of_text(texts)]
        if any(seconds):
            options["prompt_2"] = [second or text for text, second in zip(texts, seconds, strict=True)]
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False, **options
        )
        return embeds, pooled

    def _encode_skipping(self, texts: list[str], clip_skip: int) -> Tensor:
        """An inner layer's output through the final norm, which diffusers looks for where transformers 4 had it."""
        encoder, tokenizer = self.text_encoder, self.pipeline.tokenizer
        tokens = tokenizer(
            self.pipeline.maybe_convert_prompt(texts, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
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
        unet = self.unet
        embedded = unet.config.time_cond_proj_dim is not None  # a distilled model takes the scale as an input
        guided = guidance_scale > 1 and not embedded
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled
        size = conditioning.size
        if self.is_xl and size is None:
            size = self.size_ids(len(latents), embeds)
        if guided:
            embeds = torch.cat([conditioning.negative_prompt_embeds, embeds])
            pooled = torch.cat([conditioning.negative_pooled, pooled])
            if size is not None:
                size = torch.cat([size if conditioning.negative_size is None else conditioning.negative_size, size])
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            gates = None if gates is None else torch.cat([gates, gates])
        if conditioning.lora_scale != 1:
            # factors are averaged apart: the root on each side scales their product
            scale = conditioning.lora_scale**0.5 if factors else conditioning.lora_scale
            gates = None if gates is None else gates * scale
            merged = None if merged is None else [value * scale for value in merged]
        inputs: dict[str, Any] = {}
        if self.is_xl:
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size}
        if embedded:
            inputs["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(
                torch.full((len(latents),), float(guidance_scale) - 1), unet.config.time_cond_proj_dim
            ).to(latents.device, embeds.dtype)
        if conditioning.attention_kwargs:
            inputs["cross_attention_kwargs"] = dict(conditioning.attention_kwargs)
        with self.lock:
            self.rows_run += len(latents) // (2 if guided else 1)
            bank = self.adapters
            with bank.gated(gates, factors) if merged is None else bank.merged(merged, factors):
                output = unet(
                    latents.to(embeds.dtype), timesteps, encoder_hidden_states=embeds, return_dict=False, **inputs
                )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        output = unconditional + guidance_scale * (conditional - unconditional)
        if conditioning.guidance_rescale > 0:
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

            output = rescale_noise_cfg(output, conditional, guidance_rescale=conditioning.guidance_rescale)
        return output

    def size_ids(
        self,
        rows: int,
        like: Tensor,
        size: tuple[int, int] | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """``Conditioning.size`` of images of ``size`` (height, width), placed as ``like``: (rows, 6)."""
        size = size or self.default_size
        ids = torch.tensor([[*(original_size or size), *crop, *(target_size or size)]], dtype=like.dtype)
        return ids.to(like.device).expand(rows, -1)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        if self.is_xl and vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
            with self.lock:
                vae.to(torch.float32)  # it overflows in half precision; it stays in float32 from its first use on
        chunks = denormalized(latents, vae.config).to(vae.dtype).split(self.decode_batch_size)
        images = [vae.decode(chunk, return_dict=False)[0].float() for chunk in chunks]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def denormalized(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Latents (B, C, h, w) in the VAE's own scale, from its config: x · std / scale + mean, or x / scale + shift."""
    scale = config.get("scaling_factor") or 1.0
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(part).view(1, -1, 1, 1).to(latents) for part in (mean, std))
        latents = latents * std / scale + mean
    else:
        latents = latents / scale
    return latents + shift if shift else latents


def load_pipeline(pretrained: str, dtype: Any = torch.float32, variant: str | None = None, **options: Any) -> Any:
    """A diffusers text-to-image pipeline, safety checker off unless ``options`` bring one.

    Args:
        pretrained: local folder, hub id, or "miniature".
        dtype: precision of all weights, or component → precision (with "default").
        variant: weight variant of the files.
        options: further keywords of diffusers' ``from_pretrained``: components, ``revision``, ``use_safetensors``, …

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
        where = {name: options[name] for name in HUB_OPTIONS if name in options}
        kind = DiffusionPipeline.load_config(source, **where)["_class_name"]
        off = {} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variant, **{**off, **options})
    except OSError as error:  # huggingface_hub's errors for a missing model or network are OSErrors
        raise FileNotFoundError(f"{advice} ({type(error).__name__}: {str(error).splitlines()[0]})") from error
