"""A family of models: what differs between Stable Diffusion, SDXL and every other diffusers pipeline.

One file per family. A family of your own, in any module::

    @register("MyPipeline")
    class MyFamily(Family):
        def encode(self, texts, device, clip_skip=None): ...
        def forward(self, latents, timesteps, conditioning, guidance_scale): ...

serves every pipeline of the class ``MyPipeline`` once the module is imported. To name it in YAML, put a backbone beside
it, whose path is the config's ``class_path``::

    class MyBackbone(DiffusersBackbone):
        family_class = MyFamily
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from dblightning.adapters import ATTENTION
from dblightning.backbone.base import Conditioning, Prediction, Size, prediction_of
from dblightning.flow_solver import is_flow
from dblightning.schedule import ddim_scheduler

#: "classifier-free" runs an unconditional pass beside the conditional one; "embedded" is an input of the denoiser
Guidance = Literal["classifier-free", "embedded"]
#: a prompt: the first text encoder's text, then each further one's (None: the same as the first's)
Text = tuple[str | None, ...]
Embeddings = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

#: pipeline class → family
FAMILIES: dict[str, type[Family]] = {}

F = TypeVar("F", bound="type[Family]")


class Family(ABC):
    """Encoding, denoising and decoding of the pipelines of one class. Everything is read from the pipeline at each use.

    Latents come and go as (B, C, h, w): a family whose denoiser takes tokens packs and unpacks them in :meth:`forward`.

    Args:
        pipeline: a diffusers pipeline.
        resolution: image side in pixels; None takes the model's own.
    """

    #: the denoiser's name among the pipeline's components
    denoiser_name: ClassVar[str] = "unet"
    #: what the denoiser's keys in a LoRA file in diffusers' form start with
    lora_prefix: ClassVar[str] = "unet"
    #: the layers that a new adapter is put on, where none are named
    target_modules: ClassVar[tuple[str, ...]] = ATTENTION
    #: the components that are computed with, those there are
    components: ClassVar[tuple[str, ...]] = (
        "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"
    )  # fmt: skip
    #: what the denoiser is made of, by diffusers' class names; compiled one by one
    repeated_blocks: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")
    #: the plain pipeline's own default
    guidance_scale: ClassVar[float] = 7.5
    #: whether a call may bring embeddings: :meth:`pooled` is there
    takes_embeddings: ClassVar[bool] = False
    #: whether :meth:`guide` is affine in both passes. Where it is not (a norm taken of the guided prediction, as in
    #: Qwen-Image or APG), a blend mixes each pass and guides once
    affine_guidance: ClassVar[bool] = True
    #: whether the plain pipeline's output holds a safety checker's verdicts
    has_verdicts: ClassVar[bool] = False
    #: keywords of ``from_pretrained``, unless others are given
    load_options: ClassVar[Mapping[str, Any]] = {}

    #: tokens of the longest text encoder's embedding, an argument of :meth:`encode`; None: it has no such argument
    max_sequence_length: int | None = None

    def __init__(self, pipeline: Any, resolution: int | None = None) -> None:
        self.pipeline = pipeline
        self.resolution = resolution

    # ── making a pipeline ────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        """The pipeline in a folder or of a hub id; ``options`` as of diffusers' ``from_pretrained``."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(source, **options)

    @classmethod
    def assemble(cls, components: Mapping[str, Any]) -> Any | None:
        """A plain pipeline of components; None if they are another family's."""
        return None

    # ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def denoiser(self) -> Any:
        """The denoiser, None where the pipeline has none."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def guidance(self) -> Guidance:
        """The way ``guidance_scale`` acts."""
        return "classifier-free"

    @property
    def prediction(self) -> Prediction:
        """The kind of output of :meth:`forward`."""
        return prediction_of(self.pipeline.scheduler.config)

    @property
    @abstractmethod
    def pooled_dim(self) -> int:
        """P, the size of ``Conditioning.pooled``."""

    def check_scheduler(self, scheduler_config: Mapping[str, Any]) -> None:
        """Whether the model can be stepped by a scheduler of this configuration.

        Raises:
            ValueError: one of flow matching, whose velocities this family does not predict.
        """
        if is_flow(scheduler_config):
            raise ValueError(
                f"a {type(self.pipeline).__name__} predicts noise and its scheduler is of flow matching "
                f"({scheduler_config.get('_class_name', 'FlowMatch…')}), which steps velocities; use DDIMScheduler, or "
                "another one with β's"
            )

    def default_scheduler(self) -> Any:
        """The scheduler of a pipeline that was loaded without a choice: DDIM with the model's noise schedule.

        Raises:
            ValueError: a configuration that DDIM cannot use.
        """
        return ddim_scheduler(self.pipeline.scheduler.config)

    def schedule_options(self, num_inference_steps: int | None, size: Size | None = None) -> dict[str, Any]:
        """Further keywords of ``solvers.make_solver`` for images of a size in pixels (None: :attr:`default_size`).

        Raises:
            ValueError: a size that the schedule was not made for.
        """
        return {}

    @property
    def default_size(self) -> Size:
        """Height and width of an image in pixels, where none are given."""
        if self.resolution is not None:
            return self.resolution, self.resolution
        side = self.denoiser.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return int(height) * self.pipeline.vae_scale_factor, int(width) * self.pipeline.vae_scale_factor

    @property
    def size_unit(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def size_step(self) -> int:
        """Height and width are best multiples of this many pixels."""
        return self.size_unit

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``size``."""
        factor = self.pipeline.vae_scale_factor
        return int(self.denoiser.config.in_channels), size[0] // factor, size[1] // factor

    @property
    def zero_negative(self) -> bool:
        """Whether the unconditional pass has zeros for embeddings where no negative prompt is given."""
        return False

    @property
    def embeds_dtype(self) -> torch.dtype:
        """Precision of the embeddings, in which the plain pipeline draws its noise."""
        encoder = getattr(self.pipeline, "text_encoder", None)
        dtype: torch.dtype = (self.denoiser if encoder is None else encoder).dtype
        return dtype

    @property
    def vae_in_float32(self) -> bool:
        """Whether the VAE overflows in float16."""
        return False

    def takes(self, name: str) -> bool:
        """Whether the plain pipeline's call has an argument of this name."""
        return name in inspect.signature(type(self.pipeline).__call__).parameters

    # ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def encode(
        self, texts: Sequence[Text], device: torch.device, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and pooled (B, P) of texts, prompts and negative prompts alike.

        Args:
            texts: B texts.
            device: where the text encoders compute.
            clip_skip: last layers of the text encoders to leave out, as in diffusers.
        """

    def complete(
        self, texts: Mapping[str, Any], embeddings: Mapping[str, Tensor | None], options: Mapping[str, Any]
    ) -> Embeddings:
        """Embeddings of a call that brings some of them, the others made from its texts by the plain pipeline.

        Args:
            texts: prompt, negative_prompt and (where the pipeline takes them) prompt_2, …, by diffusers' names.
            embeddings: prompt_embeds, negative_prompt_embeds and the pooled ones likewise, None where not given.
            options: device, num_images_per_prompt, do_classifier_free_guidance and clip_skip, as diffusers'
                ``encode_prompt`` takes them.

        Returns:
            Embeddings and pooled, then the negative ones; None where there are none.

        Raises:
            ValueError: embeddings that do not go together.
        """
        if not self.takes_embeddings:
            raise ValueError(f"embeddings cannot be given to a {type(self.pipeline).__name__} here; give prompts")
        self.pipeline.check_inputs(height=8, width=8, callback_steps=None, **texts, **embeddings)
        return self.pooled(*self.pipeline.encode_prompt(**texts, **embeddings, **options))

    def pooled(self, embeds: Tensor, negative_embeds: Tensor | None, *pooled: Tensor | None) -> Embeddings:
        """The result of :meth:`complete` from that of the plain pipeline's ``encode_prompt``."""
        raise NotImplementedError

    def added(
        self, rows: int, like: Tensor, size: Size | None, **sizes: Any
    ) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor] | None]:
        """``Conditioning.added`` and ``negative_added``.

        Args:
            rows: B.
            like: has their dtype and device.
            size: the images', in pixels; None is :attr:`default_size`.
            sizes: a call's original_size, target_size, … by diffusers' names, for a pipeline that takes them.
        """
        return None, None

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """The denoiser's output.

        Args:
            latents: (R, C, h, w), float32; the rows of both passes where guidance is classifier-free and on.
            timesteps: (R,), as the scheduler counts them.
            conditioning: R rows; the negative fields play no part.
            guidance_scale: read by a family of embedded guidance alone.

        Returns:
            (R, C, h, w), in any precision.
        """

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, conditioning: Conditioning) -> Tensor:
        """Both passes as one prediction (R, C, h, w), float32."""
        output = unconditional + scale * (conditional - unconditional)
        if conditioning.guidance_rescale > 0:
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

            output = rescale_noise_cfg(output, conditional, guidance_rescale=conditioning.guidance_rescale)
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's output for latents (B, C, h, w), in [-1, 1] but for overshoot."""
        vae = self.pipeline.vae
        decoded: Tensor = vae.decode(denormalized(latents, vae.config).to(vae.dtype), return_dict=False)[0]
        return decoded

    def use_eager_attention(self) -> None:
        """Compute attention by plain matrix products.

        Raises:
            ValueError: a family without them.
        """
        raise ValueError(f'attention="eager" is not known for a {type(self.pipeline).__name__}; use "sdpa"')


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


def register(*pipelines: str) -> Callable[[F], F]:
    """Class decorator: the family serves diffusers pipelines of these classes, and of classes derived from them."""

    def add(family: F) -> F:
        FAMILIES.update(dict.fromkeys(pipelines, family))
        return family

    return add


def family_of(pipeline: type) -> type[Family]:
    """The family of a pipeline class.

    Raises:
        ValueError: none is registered.
    """
    for each in pipeline.__mro__:
        if each.__name__ in FAMILIES:
            return FAMILIES[each.__name__]
    raise ValueError(
        f"no family of models is known for a {pipeline.__name__}; supported are {', '.join(FAMILIES)}, and what "
        "dblightning.backbone.register adds"
    )
