"""A diffusers pipeline as the parts the algorithm needs: encode prompts, denoise with gates, decode."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dblightning.adapters import AdapterBank, silence_text_adapters
from dblightning.backbone.base import Conditioning, Prediction, Size
from dblightning.backbone.denoising import Denoising
from dblightning.backbone.family import Family, Text, family_of
from dblightning.backbone.loading import load_pipeline
from dblightning.miniature import EMBEDDED
from dblightning.prompt_cache import PromptCache, text_state

DType = Literal["float32", "bfloat16", "float16"]
#: compiled forms of one block's code: a dozen sizes in SDXL, times base, gated and merged
COMPILED_VARIANTS = 64

_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(owner: Any) -> Any:
    """The lock of a denoiser, the same for every backbone that wraps it; a copy of the denoiser has its own."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(owner, threading.RLock())


class DiffusersBackbone(Denoising):
    """A diffusers pipeline: Stable Diffusion 1.x or 2.x, SDXL, or what :func:`register` has added.

    Args:
        pretrained: a local pipeline folder, a hub id, or "miniature" or "miniature-flow" for an embedded pipeline.
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
        without: components to leave out, such as SD3's ("text_encoder_3", "tokenizer_3"): T5's embedding is then zero.
        max_sequence_length: tokens of T5's embedding (SD3: 256, FLUX: 512, miniature-flow: 10); None takes the model's.
        prompt_cache_size: how many prompts' embeddings are kept.
        prompt_cache_bytes: how much memory they may take.

    ``denoiser`` (or ``unet``), ``vae`` and the text encoders are the pipeline's: they are read there at each use, and
    assigning one here assigns it there.

    Raises:
        FileNotFoundError: no model there; the message says what to do.
        ValueError: a pipeline of no known family.
    """

    #: the family, whatever the pipeline's class; None is the one registered for that class
    family_class: ClassVar[type[Family] | None] = None
    family: Family

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
        max_sequence_length: int | None = None,
        without: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        absent = dict.fromkeys(without)
        pipeline = load_pipeline(pretrained, getattr(torch, dtype), variant, self.family_class, **absent)
        self._wrap(pipeline, resolution, decode_batch_size, PromptCache(prompt_cache_size, prompt_cache_bytes))
        if vae_dtype is None and self.family.vae_in_float32:
            vae_dtype = "float32"
        if vae_dtype is not None:
            self.vae.to(getattr(torch, vae_dtype))
        if max_sequence_length is None and pretrained in EMBEDDED:
            max_sequence_length = EMBEDDED[pretrained].text_tokens
        if max_sequence_length is not None:
            if self.family.max_sequence_length is None:
                raise ValueError(f"max_sequence_length is no setting of a {type(pipeline).__name__}; leave it out")
            self.family.max_sequence_length = max_sequence_length
        if attention == "eager":
            self.family.use_eager_attention()
        if channels_last:
            self.denoiser.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()
        self.compile_denoiser(compile)

    @classmethod
    def from_pipeline(cls, pipeline: Any, resolution: int | None = None) -> DiffusersBackbone:
        """Wrap a loaded pipeline; its denoiser is frozen in place."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        backbone.pretrained = str(pipeline.config.get("_name_or_path") or "")
        backbone._wrap(pipeline, resolution, decode_batch_size=16, prompt_cache=PromptCache(4096, 2**30))
        return backbone

    def _wrap(self, pipeline: Any, resolution: int | None, decode_batch_size: int, prompt_cache: PromptCache) -> None:
        family = self.family_class or family_of(type(pipeline))
        self.pipeline = pipeline
        self.family = family(pipeline, resolution)
        self.decode_batch_size = decode_batch_size
        self._prompt_cache = prompt_cache
        self._bank: AdapterBank | None = None
        for name in family.components:
            component = getattr(pipeline, name, None)
            if component is not None:
                component.requires_grad_(False)
        if self.denoiser is not None:
            if self.resolution % self.size_step:
                raise ValueError(f"resolution {self.resolution} must be a multiple of {self.size_step} for this model")
            assert self.adapters is not None  # refuses LoRAs it cannot gate
        silence_text_adapters(pipeline)
        self.eval()

    # ── the components, read from the pipeline ───────────────────────────────────────────────────────────────────────

    @property
    def _modules(self) -> dict[str, nn.Module | None]:
        """Submodules as torch sees them, to move, count or save them: whatever the pipeline has now."""
        family = self.__dict__.get("family")
        if family is None:  # in the constructor
            return {}
        found = {name: getattr(family.pipeline, name, None) for name in family.components}
        return {name: component for name, component in found.items() if isinstance(component, nn.Module)}

    @_modules.setter
    def _modules(self, value: Any) -> None:
        """Nothing of what nn.Module's constructor sets."""

    def __setattr__(self, name: str, value: Any) -> None:
        family = self.__dict__.get("family")
        name = family.denoiser_name if family is not None and name in ("denoiser", "unet") else name
        if family is not None and name in family.components:
            setattr(self.pipeline, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser, None where it has none."""
        return self.family.denoiser

    @property
    def unet(self) -> Any:
        """The denoiser under its first name."""
        return self.denoiser

    @property
    def vae(self) -> Any:
        """The pipeline's VAE."""
        return self.pipeline.vae

    @property
    def text_encoder(self) -> Any:
        """The pipeline's first text encoder."""
        return self.pipeline.text_encoder

    @property
    def text_encoder_2(self) -> Any:
        """The pipeline's second text encoder; None where it has one."""
        return getattr(self.pipeline, "text_encoder_2", None)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """All of them."""
        found = (getattr(self.pipeline, name, None) for name in self.family.components if "text_encoder" in name)
        return [encoder for encoder in found if encoder is not None]

    @property
    def adapters(self) -> AdapterBank:  # type: ignore[override]
        """The adapters of the pipeline's denoiser; a denoiser assigned since brings its own LoRAs."""
        family, denoiser = self.family, self.denoiser
        if denoiser is None:
            raise ValueError(
                f"the pipeline has no {family.denoiser_name}, so there are no adapters and nothing to denoise with; "
                "set one"
            )
        denoiser = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile(denoiser) wraps the same weights
        if self._bank is None or self._bank.denoiser is not denoiser:
            kept = {} if self._bank is None else {"merged_limit": self._bank.merged_limit}
            self._bank = AdapterBank(denoiser, prefix=family.lora_prefix, target_modules=family.target_modules, **kept)
        return self._bank

    @property
    def lock(self) -> Any:
        """Held while the gates are set for a denoiser call: one denoiser serves one call at a time."""
        denoiser = self.denoiser
        return lock_of(self.pipeline if denoiser is None else getattr(denoiser, "_orig_mod", denoiser))

    @property
    def device(self) -> torch.device:
        """Device on which the denoiser computes; under offloading its weights wait on another."""
        denoiser = self.denoiser
        place = getattr(getattr(denoiser, "_hf_hook", None), "execution_device", None)
        if place is not None:  # model offload: weights wait on the CPU and compute elsewhere
            return torch.device(place)
        if denoiser is not None and any(hasattr(each, "_diffusers_hook") for each in (denoiser, *denoiser.children())):
            return torch.device(self.pipeline._execution_device)  # group offload
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    @property
    def can_merge(self) -> bool:
        """Whether merged copies of the weights may stand in for them: not where hooks move or cast the weights."""
        denoiser = self.denoiser
        hooked = any(hasattr(each, "_diffusers_hook") for each in (denoiser, *denoiser.children()))
        return not (hooked or hasattr(denoiser, "_hf_hook"))

    @property
    def scheduler_config(self) -> dict[str, Any]:
        config = dict(self.pipeline.scheduler.config)
        self.family.check_scheduler(config)
        return config

    def schedule_options(self, num_inference_steps: int | None, size: Size | None = None) -> dict[str, Any]:
        return self.family.schedule_options(num_inference_steps, size)

    @property
    def prediction(self) -> Prediction:
        return self.family.prediction

    @property
    def default_size(self) -> Size:
        """Height and width of an image in pixels, where none are given."""
        return self.family.default_size

    @property
    def resolution(self) -> int:
        """Image side in pixels."""
        return self.default_size[0]

    @property
    def size_step(self) -> int:
        """Height and width are best multiples of this many pixels."""
        return self.family.size_step

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.latent_shape_of(None)

    def latent_shape_of(self, size: Size | None) -> tuple[int, int, int]:
        return self.family.latent_shape(size or self.default_size)

    @property
    def pooled_dim(self) -> int:
        return self.family.pooled_dim

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, under the gates the forward had."""

        def checkpoint(module: nn.Module, *args: Any) -> Any:
            snapshot = self.adapters.snapshot()

            def run(*inputs: Any) -> Any:
                with self.lock, self.adapters.restored(snapshot):
                    return module(*inputs)

            return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(checkpoint)

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
            self.denoiser.compile(**options)
            return
        for module in self.denoiser.modules():
            if type(module).__name__ in self.family.repeated_blocks:
                module.compile(**options)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        size: Size | None = None,
    ) -> Conditioning:
        """As ``Backbone.encode``; ``size`` is the images' height and width in pixels, None the backbone's own."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string; pass [prompt]")
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * len(prompts)
        else:
            negatives = list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts")
        embeds, pooled, negative_embeds, negative_pooled = self.embed(
            [(text,) for text in prompts], [(text,) for text in negatives]
        )
        if negative_prompt is None and self.family.zero_negative:
            negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        conditioning = Conditioning(embeds, pooled, negative_embeds, negative_pooled)
        return self.sized(conditioning, size)

    def sized(self, conditioning: Conditioning, size: Size | None = None, **sizes: Any) -> Conditioning:
        """Conditioning of images of a size (None: the backbone's own), and what the denoiser is given of it.

        ``sizes`` as for :meth:`Family.added`.
        """
        embeds = conditioning.prompt_embeds
        added, negative_added = self.family.added(len(embeds), embeds, size, **sizes)
        return conditioning._replace(size=size, added=added, negative_added=negative_added)

    @torch.no_grad()
    def embed(
        self,
        prompts: Sequence[Text],
        negatives: Sequence[Text],
        clip_skip: int | None = None,
        thorough: bool = False,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings of texts, each encoded once and cached as long as the text encoders stay what they are.

        Args:
            prompts: B texts, each with the further text encoders' texts, if any (None: the same).
            negatives: B texts likewise.
            clip_skip: last layers of the text encoders to leave out, of the prompts' embeddings (as in diffusers).
            max_sequence_length: tokens of the longest text encoder's embedding; None is the family's own.
            thorough: look for changed text encoders more closely, see :func:`dblightning.prompt_cache.text_state`.

        Returns:
            Embeddings (B, L, D) and pooled (B, P) of the prompts, then of the negatives.
        """
        cache = self._prompt_cache
        length = max_sequence_length or self.family.max_sequence_length
        keys = [(_shortest(text), clip_skip or None, length) for text in prompts]  # 0 leaves out nothing
        negative_keys = [(_shortest(text), None, length) for text in negatives]
        silence_text_adapters(self.pipeline)
        with self.lock:
            cache.made_by(text_state(self.pipeline, thorough))
            missing = [key for key in dict.fromkeys([*keys, *negative_keys]) if key not in cache]
            extra = {} if length is None else {"max_sequence_length": length}
            for skip in dict.fromkeys(skip for _, skip, _ in missing):
                group = [key for key in missing if key[1] == skip]
                for start in range(0, len(group), 64):
                    chunk = group[start : start + 64]
                    cached = self.family.encode([text for text, *_ in chunk], self.device, skip, **extra)
                    for key, embeds, pooled in zip(chunk, *cached, strict=True):
                        cache[key] = (embeds, pooled)
            found = [zip(*(cache[key] for key in each), strict=True) for each in (keys, negative_keys)]
            stacked = [torch.stack(part) for pair in found for part in pair]
            cache.trim()
        return stacked[0], stacked[1], stacked[2], stacked[3]

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        if vae.dtype == torch.float16 and self.family.vae_in_float32:
            with self.lock:
                vae.to(torch.float32)  # it overflows in half precision; it stays in float32 from its first use on
        images = [self.family.decode(chunk).float() for chunk in latents.split(self.decode_batch_size)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def _shortest(text: Text) -> Text:
    """A text without the further texts that are the same as the first one."""
    return text if text[-1] is not None else _shortest(text[:-1])
